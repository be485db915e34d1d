"""Two gloo processes against one: losses, weights, evaluation, resuming with another number of processes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import run_evaluation
from safetensors.torch import load_file
from tiny_training import TinyParts, save_parts, training_config
from torch.utils.data import BatchSampler
from transformers import Trainer

from layalign.training import TrainConfig, build_model, load_train_config, train
from layalign.training.checkpoints import checkpoints
from layalign.training.distributed import EvenShares, weights_of_step
from layalign.training.trainer import LayAlignTrainer
from layalign.utils.errors import ArgumentError

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
STEPS, MICRO, BATCH, DEV, SAVED = 8, 2, 8, 7, 3  # 41 examples: the sixth step has one; dev batches: 3, 3, 1


def settings(parts: TinyParts, output: Path, **changes: Any) -> dict[str, Any]:
    common = dict(max_steps=STEPS, micro_batch_size=MICRO, eval_batch_size=3, batch_size=BATCH, dev_size=DEV)
    common |= dict(eval_steps=2, save_steps=SAVED, save_total_limit=None)
    return training_config(parts, output, **{**common, **changes}).to_dict()


def launch(folder: Path, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the jobs in two processes; what their main one found."""
    plan, results = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [*command, str(ROOT / "tests" / "helpers" / "distributed_worker.py"), str(plan), str(results)],
        capture_output=True, text=True, env=environment, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return found


def losses(log: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in log if key in entry}


def assert_same_log(found: list[dict[str, Any]], wanted: list[dict[str, Any]], after: int = 0) -> None:
    for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        one, two = (
            {step: value for step, value in losses(log, key).items() if step > after} for log in (wanted, found)
        )
        assert one.keys() == two.keys() and one, key
        for step, value in one.items():
            assert two[step] == pytest.approx(value, rel=TOLERANCE, abs=1e-12), (key, step)


def assert_same_weights(found: Path, wanted: Path) -> None:
    one, two = load_file(wanted / "model.safetensors"), load_file(found / "model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert weight.dtype == two[name].dtype
        torch.testing.assert_close(
            two[name], weight, rtol=TOLERANCE, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def cut_off(run: Path, folder: Path) -> None:
    """A run as if it had been stopped behind its first checkpoint."""
    shutil.copytree(run / f"checkpoint-{SAVED}", folder / f"checkpoint-{SAVED}")
    for name in ("train_config.yaml", "training.json"):
        shutil.copy(run / name, folder / name)


def run_engines(folder: Path, engines: list[str | None]) -> dict[str, Any]:
    """Every engine against one process, and resuming from one to two processes and back."""
    parts = save_parts(folder)
    whole = train(training_config(parts, folder / "one", **_own(settings(parts, folder / "one"))))
    wanted = json.loads(json.dumps(whole.log_history))
    jobs = []
    for engine in engines:
        for name in (str(engine), f"{engine}-on"):
            config = settings(parts, folder / name, sharding=engine)
            if name.endswith("-on"):
                cut_off(folder / "one", folder / name)
            jobs.append({"name": name, "kind": "train", "config": config})
    stages = two_stages(parts, folder, engines[-1])
    trouble = [job for engine in engines for job in trouble_of(parts, folder, engine)]
    found = launch(folder, [*jobs, *trouble, *stages, *evaluation_jobs(parts, folder)])
    for job in stages:
        one = {**job["config"], "sharding": None, "output_dir": job["config"]["output_dir"] + "-one"}
        if job["name"] == "task":
            one["init_checkpoint"] += "-one"
        train(TrainConfig(**one))
        assert_same_weights(folder / job["name"], folder / f"{job['name']}-one")
    for engine in engines:
        name = str(engine)
        assert_same_log(found[name]["log"], wanted)
        assert found[name]["before"] == pytest.approx(whole.loss_before, rel=TOLERANCE)
        assert found[name]["after"] == pytest.approx(whole.loss_after, rel=TOLERANCE)
        assert_same_weights(folder / name, folder / "one")
        # One to two.
        assert found[f"{name}-on"]["resumed"] is not None
        assert_same_log(found[f"{name}-on"]["log"][1:], wanted, after=SAVED)
        assert_same_weights(folder / f"{name}-on", folder / "one")
        # Two to one.
        cut_off(folder / name, folder / f"{name}-back")
        back = train(training_config(parts, folder / f"{name}-back", **_own(settings(parts, folder / f"{name}-back"))))
        assert back.resumed_from is not None
        assert_same_log(json.loads(json.dumps(back.log_history))[1:], wanted, after=SAVED)
        assert_same_weights(folder / f"{name}-back", folder / "one")
        check_trouble(found, folder, name)
    check_evaluation(folder)
    return found


def trouble_of(parts: TinyParts, folder: Path, engine: str | None) -> list[dict[str, Any]]:
    """One of the two processes has a NaN, or gets SIGTERM; DeepSpeed cannot leave a step out."""
    kinds = {"sigterm": 0} if str(engine).startswith("zero") else {"nan": 1, "sigterm": 0}
    common = dict(sharding=engine, max_steps=4, save_steps=0, eval_steps=0)
    return [
        {
            "name": f"{what}-{engine}", "kind": "trouble", "what": what,
            "config": settings(parts, folder / f"{what}-{engine}", max_skipped_steps=skipped, **common),
        }
        for what, skipped in kinds.items()
    ]  # fmt: skip


def check_trouble(found: dict[str, Any], folder: Path, engine: str) -> None:
    """All processes leave the same step out, and all stop behind the same one."""
    assert "checkpoint-2 is complete" in found[f"sigterm-{engine}"]["stopped"]
    assert [path.name for path in checkpoints(folder / f"sigterm-{engine}")] == ["checkpoint-2"]
    if f"nan-{engine}" in found:
        assert found[f"nan-{engine}"]["skipped"] == [3]
        assert math.isfinite(found[f"nan-{engine}"]["after"])
        weights = load_file(folder / f"nan-{engine}" / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())


def two_stages(parts: TinyParts, folder: Path, engine: str | None) -> list[dict[str, Any]]:
    """Both stages in one go, with what else shares the weights: LoRA, and checkpointed activations."""
    common = dict(sharding=engine, max_steps=2, save_steps=0, gradient_checkpointing=True)
    common |= dict(adam_epsilon=1e-3)  # with a small one AdamW makes whole steps of gradients that are mere rounding
    first = settings(parts, folder / "translation", lora={"r": 2, "target_modules": ["q_proj", "k_proj"]}, **common)
    start = str(folder / "translation")
    second = settings(parts, folder / "task", stage="task", init_checkpoint=start, learning_rate=5e-3, **common)
    return [
        {"name": "translation", "kind": "train", "config": first},
        {"name": "task", "kind": "train", "config": second, "goes_on": True},
    ]


def evaluation_jobs(parts: TinyParts, folder: Path) -> list[dict[str, Any]]:
    """The test set by one process here; then whole by two, and by two where one had been stopped in between."""
    job = {"kind": "evaluate", "model": str(folder / "one"), "data": parts.data}
    run_evaluation({**job, "output": str(folder / "answers-one")})
    shutil.copytree(folder / "answers-one", folder / "answers-on")
    for file in (folder / "answers-on/predictions").glob("*.json*"):
        if file.suffix == ".json":
            file.unlink()
        else:
            file.write_text(file.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    kinds = {"answers-on": "evaluate", "answers-two": "command"}
    answers = [{**job, "name": name, "kind": kind, "output": str(folder / name)} for name, kind in kinds.items()]
    measures = ["chrf", "nats", "nats-other-source", "right-one-of-2"]
    measured = {**job, "task": "translation", "data": f"pairs:{parts.data}/bilingual_pairs"}
    measured["options"] = {"measures": measures, "limit": 5}
    run_evaluation({**measured, "output": str(folder / "measures-one")})
    # The command is the last job: it leaves the process group.
    return [{**measured, "name": "measures-two", "output": str(folder / "measures-two")}, *answers]


def check_evaluation(folder: Path) -> None:
    for name, one in (("answers-two", "answers-one"), ("answers-on", "answers-one"), ("measures-two", "measures-one")):
        files = sorted(path.relative_to(folder / one) for path in (folder / one).rglob("*.*"))
        assert len([file for file in files if file.suffix == ".json"]) == 4  # two languages, settings and scores
        assert sorted(path.relative_to(folder / name) for path in (folder / name).rglob("*.*")) == files
        for file in files:
            assert (folder / name / file).read_bytes() == (folder / one / file).read_bytes(), (name, file)


def _own(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("encoder", "llm", "data", "output_dir")}


@pytest.mark.slow
def test_ddp_and_fsdp2_equal_one_process(tmp_path: Path) -> None:
    sharded = hasattr(Trainer, "_prepare_for_training")  # since transformers 5.3
    found = run_engines(tmp_path, [None, "fsdp2"] if sharded else [None])
    assert found["None"]["kinds"] == {"Parameter": 62}
    if not sharded:
        return
    assert found["fsdp2"]["kinds"] == {"DTensor": 62}
    assert found["fsdp2"]["folding"] == "not folded: FSDP2 shards the model"
    check_bytes(found, build_model(load_train_config(settings(TinyParts(*_places(tmp_path)), tmp_path / "none"))))


def test_sharding_needs_a_trainer_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayAlignTrainer, "sharding", "FSDP2")
    monkeypatch.delattr(Trainer, "_prepare_for_training", raising=False)
    with pytest.raises(ArgumentError, match="^sharding: FSDP2 needs transformers 5.3 or later"):
        train(training_config(save_parts(tmp_path), tmp_path / "out"))


def check_bytes(found: dict[str, Any], model: Any) -> None:
    """What the two processes sent in a step is what docs/scale.md counts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import scale
    finally:
        sys.path.pop(0)
    units = scale.units_of(model, gpus=2)
    each, micro_batches = dict.fromkeys(units.gathered(), 4), BATCH // MICRO // 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for step in (2, 3, 4, 5):
        ddp, fsdp2 = (found[name]["steps"][step - 1] for name in ("None", "fsdp2"))
        assert ddp["all-reduce"] - fsdp2["all-reduce"] == 4 * trained  # both add up the loss
        # An evaluation leaves the output head and the root whole for the next step.
        left = 4 * (units.head + units.root) if (step - 1) % 2 == 0 else 0
        assert fsdp2["all-gather"] == micro_batches * units.gathered_bytes(each) - left, step
        assert fsdp2["reduce-scatter"] == micro_batches * 4 * units.trained


def _places(folder: Path) -> tuple[str, str, str]:
    return str(folder / "encoder"), str(folder / "llm"), str(folder / "datas")


def test_zero_equals_one_process(tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the package deepspeed (the extra layalign[deepspeed]), which is not installed")
    found = run_engines(tmp_path, ["zero2", "zero3"])
    assert found["zero2"]["kinds"] == {"Parameter": 62}
    assert found["zero3"]["kinds"] == {"ZeRO-3": 62}
    assert found["zero3"]["folding"] == "not folded: ZeRO-3 shards the model"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("examples", [1, 7, 8, 41, 48])
def test_a_step_is_the_mean_over_its_micro_batches_for_any_number_of_processes(world: int, examples: int) -> None:
    micro, share = 2, 24 // world // 2  # 24 examples a step
    inner = list(BatchSampler(range(examples), micro, drop_last=False))
    shares = [list(EvenShares(inner, world, rank)) for rank in range(world)]  # type: ignore[arg-type]
    assert {len(own) for own in shares} == {len(EvenShares(inner, world, 0))}  # type: ignore[arg-type]
    loss = [sum(index**2 for index in batch) / len(batch) for batch in inner]
    for step in range(math.ceil(len(inner) / (share * world))):
        total = 0.0
        for rank, own in enumerate(shares):
            batches = own[step * share : (step + 1) * share]
            weights = weights_of_step(len(inner), step, share, rank, world)
            assert len(weights) == len(batches)
            total += sum(w * loss[inner.index(b)] for w, b in zip(weights, batches, strict=True)) / len(batches)
        of_step = loss[step * share * world : (step + 1) * share * world]
        assert total / world == pytest.approx(sum(of_step) / len(of_step))
