"""History of the gates in training: one line of `gates.jsonl` per logged step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from layalign.data.files import decode, raw_lines
from layalign.utils.errors import DataError, first_line
from layalign.utils.files import write_whole, writing

logger = logging.getLogger("layalign")

FILE = "gates.jsonl"


def read_gates(folder: str | Path) -> list[dict[str, Any]]:
    """The recorded steps of a training folder, each `{"step": int, "gates": [float, ...]}`; empty without a record.

    For a folder `checkpoint-N` it is the record of the parent folder up to step N. A last line that was cut off when
    the process died is skipped. Other damaged lines are skipped with a warning, since only plots depend on them.
    """
    folder = Path(folder)
    name, number = folder.resolve().name.partition("checkpoint-")[::2]
    last = None
    if not (folder / FILE).is_file() and not name and number.isdigit():
        folder, last = folder.resolve().parent, int(number)
    found, damaged, read = [], [], 0
    try:
        for read, raw in raw_lines(folder / FILE) if (folder / FILE).is_file() else ():
            try:
                entry = json.loads(decode(raw))
                step, gates = int(entry["step"]), [float(gate) for gate in entry["gates"]]
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                damaged.append(read)
                continue
            if last is None or step <= last:
                found.append({"step": step, "gates": gates})
    except (OSError, DataError) as error:
        logger.warning("%s: cannot be read after line %d: %s", folder / FILE, read, first_line(error))
    if damaged and damaged != [read]:
        logger.warning("%s: line %d and %d more are damaged, skipped", folder / FILE, damaged[0], len(damaged) - 1)
    return found


class GateHistory(TrainerCallback):
    """Appends `{"step": n, "gates": [...]}` to `gates.jsonl` in the run's folder at every log, including step 0.

    Gates are written with six digits, by the main process only. A new run replaces the file; a resumed one drops the
    lines after the step it resumes from. Nothing is written for a model without gates or with sharded gates.
    """

    def __init__(self) -> None:
        self._step: int | None = None  # last step written; None outside training

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gates = gate_values(model)
        if not state.is_world_process_zero or not gates:
            return
        folder = Path(args.output_dir)
        kept = [entry for entry in read_gates(folder) if entry["step"] < state.global_step]
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._append(folder, state.global_step, gates)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # One step may be logged several times (loss, evaluation, summary).
        if self._step is None or state.global_step <= self._step:
            return
        self._append(Path(args.output_dir), state.global_step, gate_values(model))

    def _append(self, folder: Path, step: int, gates: list[float]) -> None:
        with writing(str(folder / FILE)), (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "gates": [float(f"{gate:.6g}") for gate in gates]}) + "\n")
        self._step = step


def gate_values(model: Any) -> list[float]:
    """The gates that the layers apply, copied in one transfer; empty without gates, or if they are sharded."""
    modules = list(getattr(model, "cross_attention", None) or ())
    raw = [module.adaption_gate for module in modules]
    if not raw or any(gate.numel() != 1 or hasattr(gate, "full_tensor") or hasattr(gate, "ds_id") for gate in raw):
        return []
    gates = [module.effective_gate() for module in modules]
    return torch.stack([gate.detach().float().squeeze().to(gates[0].device) for gate in gates]).tolist()
