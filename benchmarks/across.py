"""Checkpoints across versions of transformers: written with one, read with another, with the same numbers.

``python benchmarks/across.py write FOLDER`` saves a tiny model with each LLM of tests/helpers/scaling_llms.py, and its
logits. ``read FOLDER --results FILE`` in another environment loads them, compares and adds a row to the file. `nox -s
across` does this for every pair of the lowest, 5.3, 5.5 and the newest version. ``page docs/versions.md --results
FILE`` writes the rows into a page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from scaling_llms import LLMS, scaling_model  # noqa: E402
from tiny import batch  # noqa: E402

from layalign import LayAlignForCausalLM  # noqa: E402

BOUND = 1e-4  # relative to the largest logit; versions may sum in another order
SECTION = re.compile(r"(<!-- across -->\n).*?(<!-- end -->)", re.DOTALL)
INPUTS = ("input_ids", "attention_mask", "encoder_input_ids", "encoder_attention_mask")


def numbers(model: LayAlignForCausalLM, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, and the loss of the same ids."""
    with torch.no_grad():
        logits = model(**inputs).logits
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        return {"logits": logits, "loss": model(**inputs, labels=labels).loss}


def write(folder: Path) -> None:
    """Save a checkpoint and its numbers for each LLM that this version has."""
    for name in LLMS:
        model = scaling_model(name)
        inputs = batch(model=model, targets=None)
        model.save_pretrained(folder / name, save_frozen=True)
        save_file({**inputs, **numbers(model, inputs)}, folder / name / "numbers.safetensors")
        (folder / name / "by.json").write_text(json.dumps(transformers.__version__), encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """A row with the largest differences over all checkpoints of one version; prints a line for each checkpoint."""
    row: dict[str, Any] = {
        "written by": "",
        "read by": transformers.__version__,
        "llms": [],
        "logits": 0.0,
        "loss": 0.0,
    }
    for each in sorted(folder.iterdir()):
        by, name = json.loads((each / "by.json").read_text(encoding="utf-8")), each.name
        if name not in LLMS:
            print(f"{name}: written by {by}, not in {transformers.__version__}")
            continue
        saved = load_file(each / "numbers.safetensors")
        model = LayAlignForCausalLM.from_pretrained(each).eval()
        found = numbers(model, {key: saved[key] for key in INPUTS})
        off = float((found["logits"] - saved["logits"]).abs().max() / saved["logits"].abs().max())
        loss = abs(float(found["loss"] - saved["loss"]) / float(saved["loss"]))
        same = float((found["logits"].argmax(-1) == saved["logits"].argmax(-1)).float().mean())
        row["llms"].append(name)
        row.update({"written by": by, "logits": max(row["logits"], off), "loss": max(row["loss"], loss)})
        print(
            f"{name}: written by {by}, read by {transformers.__version__}: logits off by {off:.1e}, "
            f"loss by {loss:.1e}, {100 * same:.1f}% of the argmaxes"
        )
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per pair of versions."""
    lines = ["| written by | read by | LLMs | logits off by | loss off by |", "|---|---|---:|---:|---:|"]
    for row in rows:
        cells = row["written by"], row["read by"], str(len(row["llms"])), f"{row['logits']:.1e}", f"{row['loss']:.1e}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _pair(row: dict[str, Any]) -> list[int]:
    return [int(part) for name in ("written by", "read by") for part in row[name].split(".")]


def main() -> int:
    """Write, read or update the page; returns 1 if numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "read", "page"))
    parser.add_argument("folder", type=Path, help="folder of the checkpoints, or the page")
    parser.add_argument("--results", type=Path, help="JSON file with the rows")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if options.what == "write":
        write(options.folder)
        return 0
    rows = []
    if options.results is not None and options.results.exists():
        rows = json.loads(options.results.read_text(encoding="utf-8"))
    if options.what == "page":
        text = options.folder.read_text(encoding="utf-8")
        text = SECTION.sub(lambda match: match[1] + table(rows) + match[2], text)
        options.folder.write_text(text, encoding="utf-8")
        return 0
    row = read(options.folder)
    if options.results is not None:
        rows = sorted([each for each in rows if _pair(each) != _pair(row)] + [row], key=_pair)
        options.results.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if row["logits"] <= BOUND and row["loss"] <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
