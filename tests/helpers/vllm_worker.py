"""Started by tests with the path of a JSON file: answers its requests with an engine of several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from vllm_case import Case, answers, engine

    asked = json.loads(Path(sys.argv[1]).read_text())
    with engine(asked["folder"], **asked["settings"]) as llm:
        found = answers(llm, [Case(**each) for each in asked["cases"]])
    Path(sys.argv[1]).write_text(json.dumps(found))
