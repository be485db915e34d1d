"""vLLM with a LayAlign checkpoint against vLLM with its bare LLM, on the same numbers of tokens, in turns.

    python benchmarks/vllm_throughput.py CHECKPOINT LLM --output results.json

Both engines are in this process. Each round asks both for the same: prompts of the same length (the source's slots are
prompt tokens of the bare LLM), and answers of the same length. A ratio is of two rounds beside one another.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
SOURCE, ANSWER = 24, 64  # tokens of a source and of an answer


def requests(count: int, vocabulary: int, slots: bool, seed: int) -> list[dict[str, Any]]:
    """``count`` requests: sources for LayAlign, or prompts as long as what these become."""
    draw = random.Random(seed)
    if slots:
        return [
            {"prompt_token_ids": [], "multi_modal_data": {"source": [draw.randrange(10, 1000) for _ in range(SOURCE)]}}
            for _ in range(count)
        ]
    return [{"prompt_token_ids": [draw.randrange(10, vocabulary) for _ in range(SOURCE + 2)]} for _ in range(count)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("llm")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    settings = dict(
        dtype=arguments.dtype, max_model_len=512, max_num_seqs=32, max_num_batched_tokens=1024,
        enforce_eager=arguments.eager, enable_prefix_caching=False,
    )  # fmt: skip
    ours, bare = LLM(arguments.checkpoint, **settings), LLM(arguments.llm, **settings)
    how = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)

    def seconds(engine: Any, count: int, slots: bool, seed: int) -> float:
        asked = requests(count, 10_000, slots, seed)
        start = time.perf_counter()
        found = engine.generate(asked, how, use_tqdm=False)
        assert all(len(each.outputs[0].token_ids) == ANSWER for each in found)
        return time.perf_counter() - start

    rows = []
    for count in arguments.concurrency:
        seconds(ours, count, True, 0), seconds(bare, count, False, 0)
        pairs = [(seconds(ours, count, True, n), seconds(bare, count, False, n)) for n in range(arguments.rounds)]
        ratios = sorted(one / other for one, other in pairs)
        rows.append(
            {
                "concurrency": count,
                "tokens_per_second": count * ANSWER / statistics.median(one for one, _ in pairs),
                "bare_tokens_per_second": count * ANSWER / statistics.median(other for _, other in pairs),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
        print(json.dumps({key: rows[-1][key] for key in rows[-1] if key != "ratios"}), flush=True)
    report = {
        "rows": rows, "source_tokens": SOURCE, "answer_tokens": ANSWER, "dtype": arguments.dtype,
        "eager": arguments.eager, "vllm": vllm.__version__, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine(),
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
