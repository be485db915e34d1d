"""What is left after a kill, a full disk or a damaged file: whole checkpoints, and a run that goes on exactly."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import TinyParts, save_parts
from tiny_training import training_config as make_config
from transformers import TrainerCallback

from layalign import LayAlignForCausalLM
from layalign.cli import describe
from layalign.data import Example
from layalign.evaluation import evaluate
from layalign.experiments.made_up.report import write_report
from layalign.modeling.tokenization import load_tokenizers, save_tokenizers
from layalign.training import TrainSummary, train
from layalign.training.checkpoints import MANIFEST, UNFINISHED, checkpoints, problem, rotate, sha256
from layalign.training.runs import find_resume, read_run
from layalign.utils.errors import ArgumentError, CheckpointError, OutputError, StoppedError
from layalign.utils.files import write_whole


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def whole(parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainSummary]:
    """A run of six steps with checkpoints at 2, 4 and 6, and what it told."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, train(make_config(parts, output, save_steps=2, save_total_limit=None))


def losses(summary: TrainSummary) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in summary.log_history if "loss" in entry]


@pytest.mark.slow
def test_runs_and_evaluations_killed_at_random_moments(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[1] / "helpers"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(here / "killed_runs.py"), str(tmp_path), "--kills", "20", "--evaluations", "5"]
    found = subprocess.run(command, cwd=here, capture_output=True, text=True, env=environment, timeout=280)
    assert found.returncode == 0, found.stderr[-3000:]
    told = json.loads(found.stdout.splitlines()[-1])
    print(told)
    assert len(told["kills"]) == 20 and len(told["evaluations"]) == 5
    assert any(kill["unfinished"] for kill in told["kills"])  # some did cut a checkpoint off
    assert any(kill["from step"] > 0 for kill in told["kills"])


@pytest.mark.slow
def test_sigterm_ends_the_step_saves_and_stops(
    parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    config = make_config(parts, tmp_path, save_steps=4, save_total_limit=None)
    with pytest.raises(StoppedError, match="^stopped by SIGTERM after step 3; .*checkpoint-3 is complete") as error:
        train(config, callbacks=[From(2, lambda: signal.raise_signal(signal.SIGTERM))])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert describe(error.value)[1] == 143
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert not (tmp_path / "model.safetensors").exists()  # no unfinished model where a finished one is looked for
    summary = train(config)
    assert summary.resumed_from == str(tmp_path / "checkpoint-3")
    assert losses(summary) == losses(whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"max_steps": 5}], ids=str)
def test_a_run_killed_behind_its_last_checkpoint_takes_no_step_more(
    parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    for name in ("model.safetensors", "training.json"):  # written at the end
        (run / name).unlink()
    manifest = (run / "checkpoint-6" / MANIFEST).read_bytes()
    summary = train(make_config(parts, run, save_steps=2, save_total_limit=None, **changes))
    assert summary.resumed_from == str(run / "checkpoint-6") and summary.steps == 6
    assert losses(summary) == losses(whole[1]) and summary.loss_after == whole[1].loss_after
    assert (run / "checkpoint-6" / MANIFEST).read_bytes() == manifest and not (run / "checkpoint-7").exists()
    first, second = (load_file(folder / "model.safetensors") for folder in (whole[0], run))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Checkpoints


def flip(path: Path, at: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def change(folder: Path, act: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    act(content["files"])
    (folder / MANIFEST).write_text(json.dumps(content))


def name(folder: Path, file: str, **entry: Any) -> None:
    change(folder, lambda files: files.setdefault(file, {}).update(entry))


def unname(folder: Path, file: str) -> None:
    change(folder, lambda files: files.pop(file))


def signed(folder: Path, file: str, content: bytes) -> None:
    """Another content, of which the manifest knows."""
    (folder / file).write_bytes(content)
    name(folder, file, size=len(content), sha256=sha256(folder / file))


def sharded(folder: Path, weights: dict[str, str]) -> None:
    unname(folder, "model.safetensors")
    signed(folder, "model.safetensors.index.json", json.dumps({"weight_map": weights}).encode())


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, target: Path | None = None) -> None:
    """By default to the same content in another place."""
    outside = path.parent.parent / "outside"
    path.replace(outside)
    path.symlink_to(target or outside)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda c: flip(c / "model.safetensors"), r"model.safetensors: its content is not what was written"),
    "optimizer bit": (lambda c: flip(c / "optimizer.pt", 5000), r"optimizer.pt: its content"),
    "cut": (lambda c: cut(c / "optimizer.pt"), r"optimizer.pt: expected \d+ bytes, got \d+"),
    "state": (lambda c: (c / "trainer_state.json").write_text("{}"), r"trainer_state.json: expected"),
    "missing": (lambda c: (c / "scheduler.pt").unlink(), r"scheduler.pt: No such file"),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), r"manifest.json: No such file"),
    "half a manifest": (lambda c: cut(c / MANIFEST), r"manifest.json: damaged"),
    "other manifest": (lambda c: (c / MANIFEST).write_text('{"files": []}'), r"manifest.json: damaged"),
    "empty manifest": (
        lambda c: (c / MANIFEST).write_text('{"files": {}}'),
        r"manifest.json: names no trainer_state.json",
    ),
    "infinite size": (lambda c: name(c, "optimizer.pt", size=math.inf), r"manifest.json: damaged: 'optimizer.pt'"),
    "no number": (lambda c: name(c, "optimizer.pt", size=math.nan), r"manifest.json: damaged: 'optimizer.pt'"),
    "negative size": (lambda c: name(c, "optimizer.pt", size=-1), r"manifest.json: damaged: 'optimizer.pt'"),
    "digits": (
        lambda c: (c / MANIFEST).write_text('{"files": {"a": {"size": %s}}}' % ("9" * 5000)),
        r"manifest.json: damaged: it is not JSON: Exceeds the limit",
    ),
    "deep manifest": (lambda c: (c / MANIFEST).write_text("[" * 100_000), r"manifest.json: damaged: it: expected at"),
    "odd manifest": (lambda c: (c / MANIFEST).write_bytes(b'{"files": "\xff"}'), r"manifest.json: damaged: it:1 is"),
    "list of bytes": (lambda c: name(c, "optimizer.pt", sha256=["a"]), r"manifest.json: damaged: 'optimizer.pt'"),
    "pipe for a manifest": (lambda c: pipe(c / MANIFEST), r"manifest.json: damaged: it: expected a file, got a pipe"),
    "device": (lambda c: name(c, "/dev/zero", size=0, sha256=""), r"manifest.json: expected the name of a file in its"),
    "parent": (lambda c: name(c, "../training.json", size=0, sha256=""), r"manifest.json: expected the name of a file"),
    "named twice": (lambda c: name(c, "./optimizer.pt", size=0, sha256=""), r"manifest.json: expected the name of a f"),
    "pipe": (lambda c: pipe(c / "optimizer.pt"), r"optimizer.pt: expected a file, got a pipe"),
    "link out of it": (lambda c: link(c / "optimizer.pt"), r"optimizer.pt: expected a file in the checkpoint, got"),
    "link to itself": (lambda c: link(c / "optimizer.pt", c / "optimizer.pt"), r"optimizer.pt: .*[Ll]oop|Too many"),
    **{
        f"without {left_out}": (lambda c, n=left_out: unname(c, n), rf"manifest.json: names no {left_out}")
        for left_out in (
            "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json", "config.json"
        )
    },
    "removed and not named": (
        lambda c: (unname(c, "optimizer.pt"), (c / "optimizer.pt").unlink()), r"manifest.json: names no optimizer.pt"
    ),
    "index of nothing": (lambda c: sharded(c, {}), r"model.safetensors.index.json: expected a mapping"),
    "shard out of it": (lambda c: sharded(c, {"a": "../model.safetensors"}), r"manifest.json: names no '../model.saf"),
    "beside them": (lambda c: (c / "scaler.pt").write_bytes(b""), r"scaler.pt: the manifest does not name it"),
    "settings of another run": (
        lambda c: (c / "run.json").write_bytes(b"{}"), r"run.json: expected \d+ bytes, got 2"
    ),
    "no step": (lambda c: signed(c, "trainer_state.json", b"{}"), r"trainer_state.json: expected a global_step"),
    "deep state": (lambda c: signed(c, "trainer_state.json", b"[" * 10**5), r"trainer_state.json: expected at most 64"),
    "foreign state": (
        lambda c: signed(c, "trainer_state.json", b'{"global_step": 6, "nothing": 1}'),
        r"trainer_state.json: transformers cannot read it",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_never_picked_up(
    parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    act, reason = DAMAGE[damage]
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    act(run / "checkpoint-6")
    config = make_config(parts, run, save_steps=2, save_total_limit=None)
    assert find_resume(config) == run / "checkpoint-4"
    assert "checkpoint-6: not a complete checkpoint, skipped" in caplog.text
    with pytest.raises(ArgumentError, match=f"^resume: .*checkpoint-6 is not a complete checkpoint: {reason}"):
        find_resume(make_config(parts, run, save_steps=2, save_total_limit=None, resume=str(run / "checkpoint-6")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"micro_batch": 0}', "micro_batch: expected a number above 0, got 0; ignored"),
        (b'{"micro_batch": -2, "loss_before": []}', "loss_before: expected a number above 0, got []; ignored"),
        (b'{"micro_batch": true}', "micro_batch: expected a number above 0, got True"),
        (b'{"micro_batch": [4]}', "micro_batch: expected a number above 0, got [4]"),
        (b'{"micro_batch": 4.0}', "micro_batch: expected a number above 0, got 4.0"),
        (b"[]", "expected a mapping, got []; resuming without"), (b"0", "expected a mapping, got 0"),
        (b"\xff", "training.json:1 is not UTF-8; resuming without"), (b"", "is not JSON: line 1"),
        (b"[" * 100_000, "expected at most 64"), (b'{"micro_batch": 1%s}' % (b"0" * 5000), "JSON: Exceeds"),
    ],
)  # fmt: skip
def test_a_damaged_record_of_the_run(
    content: bytes, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run goes on without, and says so; with 0 it ended in a ZeroDivisionError."""
    assert read_run(tmp_path) == {} and not caplog.records
    (tmp_path / "training.json").write_bytes(content)
    assert read_run(tmp_path) == {}
    assert expected in caplog.text
    (tmp_path / "training.json").write_text('{"micro_batch": 4, "loss_before": NaN}')
    assert read_run(tmp_path)["micro_batch"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_is_none_is_named(
    parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path, file: str
) -> None:
    """The manifest holds for whoever wrote it: what is in the file may be nonsense, or a program."""
    for content in (b"", b"nonsense", pickle.dumps({"state": {}}), pickle.dumps(Payload(tmp_path / "ran"))):
        run = tmp_path / "run"
        shutil.copytree(whole[0], run, dirs_exist_ok=True)
        shutil.rmtree(run / "checkpoint-6")
        signed(run / "checkpoint-4", file, content)
        with pytest.raises(CheckpointError, match="checkpoint-4: the .* cannot be read: ") as error:
            train(make_config(parts, run, save_steps=2, save_total_limit=None))
        assert "\n" not in str(error.value)
    torch.save({"nonsense": 1}, tmp_path / "state")
    signed(run / "checkpoint-4", file, (tmp_path / "state").read_bytes())
    with pytest.raises(CheckpointError, match="checkpoint-4: the .* cannot be read: "):
        train(make_config(parts, run, save_steps=2, save_total_limit=None))
    assert not (tmp_path / "ran").exists()


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.slow
def test_a_run_goes_on_before_a_damaged_checkpoint_and_replaces_it(
    parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    flip(run / "checkpoint-6" / "optimizer.pt", 5000)
    summary = train(make_config(parts, run, save_steps=2, save_total_limit=2))
    assert summary.resumed_from == str(run / "checkpoint-4")
    assert losses(summary) == losses(whole[1])
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]
    assert not (run / UNFINISHED).exists()


@pytest.mark.slow
def test_the_best_checkpoint_has_its_final_name(parts: TinyParts, tmp_path: Path) -> None:
    changes = {"eval_steps": 2, "save_steps": 2, "keep_best": True, "save_total_limit": 1, "max_steps": 6}
    train(make_config(parts, tmp_path, **changes))
    found = checkpoints(tmp_path)
    state = json.loads((found[-1] / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) in found
    assert all(problem(path) is None for path in found)


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, tmp_path / "checkpoint-20", 2, str(tmp_path / "checkpoint-10"))
    # 100 is from beyond this run's step, and none of its business.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10", "checkpoint-100", "checkpoint-20",
    ]  # fmt: skip
    rotate(tmp_path, tmp_path / "checkpoint-20", None, None)
    rotate(tmp_path, tmp_path / "checkpoint-20", 1, None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-20"]


def test_a_flipped_bit_in_saved_weights_is_seen(whole: tuple[Path, TrainSummary], tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    flip(file)
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged: its content is not what was written"):
        LayAlignForCausalLM.from_pretrained(tmp_path / "model")
    # A file that somebody else wrote brings no sum, and is taken as it is.
    save_file(load_file(whole[0] / "model.safetensors"), file, metadata={"format": "pt"})
    LayAlignForCausalLM.from_pretrained(tmp_path / "model")


# Disk full, permission denied


class From(TrainerCallback):
    """Does something from a step on."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


@contextmanager
def limits_restored() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def largest_file_below(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# The weights fit and the optimizer does not, or neither does: torch and safetensors report it each in their own way.
@pytest.mark.slow
@pytest.mark.parametrize("too_large", ["optimizer.pt", "model.safetensors"])
def test_no_room_for_a_checkpoint(
    parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path, too_large: str
) -> None:
    size = (whole[0] / "checkpoint-6" / too_large).stat().st_size - 1
    config = make_config(parts, tmp_path, save_steps=2, save_total_limit=None)
    with limits_restored(), pytest.raises(OutputError, match="checkpoint-4: cannot be written: .*are intact") as error:
        train(config, callbacks=[From(3, lambda: largest_file_below(size))])
    assert describe(error.value)[1] == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / UNFINISHED).exists()
    summary = train(config)
    assert summary.resumed_from == str(tmp_path / "checkpoint-2")
    assert losses(summary) == losses(whole[1])


@pytest.mark.slow
def test_a_disk_that_is_really_full(parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    one = sum(path.stat().st_size for path in (whole[0] / "checkpoint-6").rglob("*"))
    size = f"size={int(one * 1.6)}"
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "layalign-test", str(disk)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a small disk needs the right to mount one")
    try:
        config = make_config(parts, disk / "run", save_steps=2, save_total_limit=None)
        with pytest.raises(OutputError, match="checkpoint-4: cannot be written: .*are intact"):
            train(config)
        assert [path.name for path in checkpoints(disk / "run")] == ["checkpoint-2"]
        subprocess.run(["mount", "-o", f"remount,size={one * 8}", str(disk)], check=True)
        assert losses(train(config)) == losses(whole[1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """Nobody's rights, where root would be let in everywhere."""
    mode, root = folder.stat().st_mode, os.geteuid() == 0
    folder.chmod(0o500)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(mode)


def test_no_permission_is_told_before_the_work(parts: TinyParts, tmp_path: Path) -> None:
    config = make_config(parts, tmp_path / "locked" / "run")
    (tmp_path / "locked").mkdir()
    with without_permission(tmp_path / "locked"), pytest.raises(OutputError, match="^output_dir: .*Permission denied"):
        train(config, examples=())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="^output_dir: .*cannot be written: Not a directory"):
        train(make_config(parts, tmp_path / "file" / "run"), examples=())


@pytest.mark.slow
def test_permission_lost_on_the_way(parts: TinyParts, whole: tuple[Path, TrainSummary], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = make_config(parts, run, save_steps=2, save_total_limit=None)
    locked = without_permission(run)
    act = From(3, locked.__enter__)
    try:
        with pytest.raises(OutputError, match="cannot be written: Permission denied"):
            train(config, callbacks=[act])
    finally:
        locked.__exit__(None, None, None)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    assert losses(train(config)) == losses(whole[1])


def test_no_room_for_an_evaluation(parts: TinyParts, tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(examples: Sequence[Example]) -> list[str]:
        asked.extend(example.source for example in examples)
        return [f"{example.source}: {'thinking ' * 100}" for example in examples]

    def run(output: Path) -> None:
        evaluate(answer, None, None, "mgsm", f"mgsm:{parts.data}", output, batch_size=1, model_name="long-winded")

    run(tmp_path / "whole")
    everything, asked[:] = [*asked], []
    answers = next((tmp_path / "whole" / "predictions").glob("*.jsonl"))
    room = answers.stat().st_size * 2 // 3  # for settings.json and a part of the answers
    assert room > (tmp_path / "whole" / "settings.json").stat().st_size
    expected = r"^output_dir: .*jsonl: cannot be written: .*a rerun goes on after them"
    with limits_restored():
        largest_file_below(room)
        with pytest.raises(OutputError, match=expected):
            run(tmp_path / "full")
    kept = sum(path.read_bytes().count(b"\n") for path in (tmp_path / "full" / "predictions").glob("*.jsonl"))
    assert 0 < kept < len(everything)
    asked.clear()
    run(tmp_path / "full")
    assert asked == everything[kept:]
    for name in ("scores.json", "scores.tsv", f"predictions/{answers.stem}.json"):
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("too_large", ["generation_config.json", "config.json", "model.safetensors", "tokenizer.json"])
def test_no_room_for_a_model(whole: tuple[Path, TrainSummary], tmp_path: Path, too_large: str) -> None:
    """What was there stays as it was, or is replaced by a whole file; nothing is left that takes the room."""
    shutil.copytree(whole[0], tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = contents(tmp_path / "model")
    size = next(len(data) for name, data in before.items() if Path(name).name == too_large) - 1
    model = LayAlignForCausalLM.from_pretrained(tmp_path / "model")
    tokenizers = load_tokenizers(tmp_path / "model")
    save: Callable[..., object] = LayAlignForCausalLM.save_pretrained
    given: tuple[Any, ...] = model, tmp_path / "model"
    if too_large == "tokenizer.json":
        save, given = save_tokenizers, (tmp_path / "model", *tokenizers)
    with limits_restored():
        largest_file_below(size)
        with pytest.raises(Exception, match="File too large"):
            save(*given)
    after = contents(tmp_path / "model")
    assert after.keys() == before.keys()
    assert all(len(data) == len(before[name]) for name, data in after.items() if name != "config.json")
    LayAlignForCausalLM.from_pretrained(tmp_path / "model")
    load_tokenizers(tmp_path / "model")


def test_no_room_for_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and pages are whole or not there, and the error is ours."""
    found = {"losses": {}, "gates": [], "mix_weights": [], "encoder_layers": []}
    for name in ("loss_curves", "gate_picture", "mix_picture"):
        monkeypatch.setattr(f"layalign.experiments.made_up.report.{name}", lambda *arguments: b"a" * 2000)
    (tmp_path / "losses.png").write_bytes(b"old")
    with limits_restored():
        largest_file_below(1000)
        with pytest.raises(OutputError, match="losses.png: cannot be written: File too large"):
            write_report(tmp_path, found)
    assert contents(tmp_path) == {"losses.png": b"old"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    write_whole(file, "old")
    with limits_restored():
        largest_file_below(100)
        with pytest.raises(OutputError, match=r"settings.json: cannot be written: File too large"):
            write_whole(file, "new" * 1000)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_optimizer_and_weights_are_those_of_the_step(whole: tuple[Path, TrainSummary]) -> None:
    weights = load_file(whole[0] / "checkpoint-6" / "model.safetensors")
    final = load_file(whole[0] / "model.safetensors")
    assert all(torch.equal(weights[name], final[name]) for name in final)
