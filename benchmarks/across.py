"""Checkpoints across versions of transformers: written in one, read in another, the same numbers in both.

``python benchmarks/across.py write FOLDER`` makes a tiny model over each LLM of tests/scaling_llms.py, with its weights
and logits; ``read FOLDER`` in another environment loads them and compares. `nox -s across` does it for every pair of
the lowest, 5.3, 5.5 and the newest version.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from scaling_llms import LLMS, scaling_model  # noqa: E402
from tiny import batch  # noqa: E402

from layalign import LayAlignForCausalLM  # noqa: E402

BOUND = 1e-4  # of the largest logit: rounding, where versions order their sums differently
INPUTS = ("input_ids", "attention_mask", "encoder_input_ids", "encoder_attention_mask")


def numbers(model: LayAlignForCausalLM, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, and the loss of the same ids."""
    with torch.no_grad():
        logits = model(**inputs).logits
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        return {"logits": logits, "loss": model(**inputs, labels=labels).loss}


def write(folder: Path) -> None:
    """A checkpoint and its numbers for each LLM that this version has."""
    for name in LLMS:
        model = scaling_model(name)
        inputs = batch(model=model, targets=None)
        model.save_pretrained(folder / name, save_frozen=True)
        save_file({**inputs, **numbers(model, inputs)}, folder / name / "numbers.safetensors")
        (folder / name / "by.json").write_text(json.dumps(transformers.__version__), encoding="utf-8")


def read(folder: Path) -> int:
    """Print a line for each checkpoint; how many give other numbers here."""
    bad = 0
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
        bad += not (off <= BOUND and loss <= BOUND)
        print(
            f"{name}: written by {by}, read by {transformers.__version__}: logits off by {off:.1e}, "
            f"loss by {loss:.1e}, {100 * same:.1f}% of the argmaxes"
        )
    return bad


def main() -> int:
    """Write or read; 1 when numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if options.what == "write":
        write(options.folder)
        return 0
    return 1 if read(options.folder) else 0


if __name__ == "__main__":
    sys.exit(main())
