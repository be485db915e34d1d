"""What a run depends on. It is written into each checkpoint, and a resumed run compares itself with it.

`run.json` holds the settings, hashes of the examples as they were read and of the weights from `init_checkpoint`, the
versions and the number of processes. The fingerprints of the frozen parts are in the checkpoint's `config.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from layalign.data import Example
from layalign.modeling import fingerprint
from layalign.modeling.checkpoint import CONFIG, WEIGHTS, digest, reading
from layalign.modeling.configuration import LayAlignConfig
from layalign.modeling.names import PARTS
from layalign.modeling.tokenization import tokenizers_hash
from layalign.nn.sharding import reason_whole_is_not_here
from layalign.training import precision
from layalign.training.config import ALLOWED_CHANGES, TrainConfig
from layalign.utils import yaml_files
from layalign.utils.errors import ArgumentError, CheckpointError, shown
from layalign.utils.files import write_whole
from layalign.utils.moved import with_new_names
from layalign.utils.reading import read_json
from layalign.utils.versions import package_version

logger = logging.getLogger("layalign.training")

FILE, SETTINGS = "run.json", "train_config.yaml"
_VERSION = 1
# What any resumed run may change: it affects neither the data nor the steps already taken.
_FREE_KEYS = {
    "output_dir", "resume", "epochs", "max_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "keep_best", "report_to", "progress", "num_workers", "eval_batch_size", "use_cpu", "max_skipped_steps",
    "spike_factor", "sharding", "allow_changed",
}  # fmt: skip
# Paths. Their content is compared, if it is recorded: a folder may have been moved, or hold something else now.
_NAMES = ("encoder", "llm", "data", "dev_data", "init_checkpoint")
_OPEN = {"dev_cut": None, "encoder_dropout": None, "bf16": "auto"}  # values that leave the choice to the run
# What runs did before the key existed.
_BEFORE_THE_KEY = {
    "dev_data": None, "dev_cut": "position", "dev_overlap": "warn", "encoder_dropout": True, "bf16": False,
}  # fmt: skip
# What decides what a model computes, besides its weights.
_OF_THE_MODEL = (
    "encoder_layers", "language_layers", "structure", "mix", "use_adapter", "adapter_size", "adapter_fusion",
    "use_prompt", "mask_encoder_padding",
)  # fmt: skip


class Difference(NamedTuple):
    """A key, and how the earlier run differs: a text that continues "the run in FOLDER"."""

    key: str
    text: str


class Earlier(NamedTuple):
    """What is known about the run that wrote a folder."""

    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]

    @property
    def changes(self) -> list[Any]:
        """What was changed on request when it was resumed before."""
        found = self.record.get("changes")
        return found if isinstance(found, list) else []

    def knows(self, key: str) -> bool:
        """Whether the run's value of a setting is known: recorded, or the only one that existed at that time."""
        written = bool(self.settings) and (key in self.settings or key in _BEFORE_THE_KEY)
        return written and not (key in _OPEN and self.setting(key) == _OPEN[key])

    def setting(self, key: str) -> Any:
        """The value of a setting, also for a run from before the key existed."""
        found = self.settings.get(key, _BEFORE_THE_KEY.get(key))
        return "stored" if key == "frozen_dtype" and found in (None, "auto") else found


# Making


def settled(config: TrainConfig, before: Earlier | None, model: Any = None) -> TrainConfig:
    """The configuration with every open setting resolved: as in the earlier run, or as a new run on this machine.

    Args:
        config: the configuration as it was given.
        before: the run that is resumed, or whose model is trained again; None for a new run.
        model: a model given in memory, whose frozen parts keep their dtype.
    """
    chosen: dict[str, Any] = {}
    if config.dev_cut is None:
        chosen["dev_cut"] = (before and before.setting("dev_cut")) or "sentence"
    if config.encoder_dropout is None and before is not None:
        chosen["encoder_dropout"] = before.setting("encoder_dropout")
    if config.bf16 == "auto":
        began = "auto" if before is None else before.setting("bf16")
        chosen["bf16"] = precision.uses_bf16(config) if began == "auto" else began
    if config.frozen_dtype == "auto":
        of_new = "stored" if model is not None else precision.frozen_dtype(replace(config, **chosen))
        chosen["frozen_dtype"] = of_new if before is None else before.setting("frozen_dtype")
    return replace(config, **chosen)


def make(
    config: TrainConfig,
    model: Any,
    tokenizers: Sequence[Any],
    train_set: Sequence[Example],
    dev_set: Sequence[Example],
    start: str,
    processes: dict[str, int],
) -> dict[str, Any]:
    """The content of `run.json`.

    Args:
        config: the result of :func:`settled`.
        model: the model to be trained.
        tokenizers: of the encoder and of the LLM.
        train_set, dev_set: the examples as they were read and split.
        start: the result of :func:`start_of`.
        processes: the number of processes and the micro batch of one.
    """
    settings = {**config.to_dict(), "encoder_dropout": model.config.encoder_dropout}
    return {
        "version": _VERSION,
        "settings": json.loads(json.dumps(settings, default=str)),
        "data": {"train": hash_of(train_set), "dev": hash_of(dev_set)},
        "init_checkpoint": start,
        "tokenizers": tokenizers_hash(*tokenizers),
        "processes": processes,
        "versions": {
            "layalign": package_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def hash_of(examples: Iterable[Example]) -> dict[str, Any]:
    """The number of examples and an order-dependent hash of their texts. Takes 1 s for a million."""
    found, count = hashlib.sha256(), 0
    for each in examples:
        parts = (each.source, each.target, each.language, each.prompt, *each.choices)
        found.update("\0".join(parts).encode("utf-8", errors="surrogatepass") + b"\1")
        count += 1
    return {"examples": count, "sha256": found.hexdigest()}


def start_of(config: TrainConfig, model: nn.Module | None, loaded: nn.Module) -> str:
    """A hash of the trained weights from `init_checkpoint`; "fresh" without one, "given" for a model in memory.

    Args:
        config: the configuration of the run.
        model: the model that was given in memory, or None.
        loaded: the model before the first step; if it is sharded, the result is "given".
    """
    weights = {name: weight for name, weight in loaded.named_parameters() if weight.requires_grad}
    if model is not None or any(reason_whole_is_not_here(weight) for weight in weights.values()):
        return "given"
    if config.init_checkpoint is None:
        return "fresh"
    if config.lora is not None:
        with reading(config.init_checkpoint, CONFIG):
            had_lora = LayAlignConfig.from_pretrained(config.init_checkpoint).lora is not None
        weights = {name: weight for name, weight in weights.items() if had_lora or "lora_" not in name}
    return digest(weights)


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write a record into a folder."""
    write_whole(folder / FILE, json.dumps(record, indent=1) + "\n")


# Reading


def overwritten(config: TrainConfig, resume_from: Path | None) -> Earlier | None:
    """The run whose model or checkpoints in `output_dir` this run would overwrite, or None.

    Raises:
        ArgumentError: the folder does not say which run wrote them, or that run's settings cannot be read.
        CheckpointError: the record cannot be read.
    """
    output = Path(config.output_dir)
    if config.resume is False or (resume_from is not None and resume_from.resolve().parent == output.resolve()):
        return None
    model = any((output / name).exists() for name in (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin"))
    held = model or (resume_from is not None and any(output.glob("checkpoint-*")))
    return earlier(output, output / SETTINGS) if held else None


def earlier(folder: Path, file: Path) -> Earlier:
    """The run that wrote a checkpoint, or the model in a run's folder.

    Args:
        folder: folder with the record `run.json`.
        file: YAML file with the run's settings, used if there is no record.

    Raises:
        ArgumentError: the folder holds a model but does not say which run wrote it, or the settings cannot be read.
        CheckpointError: the record cannot be read.
    """
    if os.path.lexists(folder / FILE):
        record = read_json(folder / FILE)
        settings = record.get("settings") if isinstance(record, dict) else None
        if not isinstance(settings, dict):
            raise CheckpointError(f"{folder / FILE}: expected what layalign writes there, with the run's settings")
        return Earlier(folder, record, with_new_names(settings, warn=False))
    if os.path.lexists(file):
        values = yaml_files.read_file(file, "output_dir")
        if not isinstance(values, dict) or not values:
            raise ArgumentError(f"output_dir: {file}: expected the settings of the run, got {shown(values)}; {_ADVICE}")
        return Earlier(folder, {}, with_new_names(values, warn=False))
    if file.parent == folder:
        raise ArgumentError(
            f"output_dir: {folder} holds a model but no {FILE} or {SETTINGS} that says which run wrote it; {_ADVICE}"
        )
    return Earlier(folder, {}, {})


def micro_batch(before: Earlier) -> dict[str, Any]:
    """The micro batch of a checkpoint's run, in the form of `training.json`; empty if it is not known."""
    known = _at(before.record, "processes", "micro_batch")
    return {"micro_batch": known} if type(known) is int and known > 0 else {}


_ADVICE = "set resume=false to start over, or another output_dir"


def _at(found: Any, *keys: str) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


# Comparing


def compare(config: TrainConfig, before: Earlier, here: dict[str, Any], model: Any, resumed: bool) -> list[str]:
    """Refuse to resume from another run's checkpoint, or to overwrite another run's finished model.

    Args:
        config: configuration of this run; its `allow_changed` names what may differ if `resumed`.
        before: the result of :func:`earlier` or :func:`overwritten`.
        here: the result of :func:`make`.
        model: the model before the first step.
        resumed: whether this run resumes from a checkpoint; otherwise it would overwrite a finished model.

    Returns:
        The differences that were allowed.

    Raises:
        ArgumentError: something differs that may not.
        CheckpointError: the checkpoint's configuration cannot be read.
    """
    unknown: list[str] = []
    found: dict[str, Difference] = {}
    for each in _differences(before, here, model, unknown):
        found.setdefault(each.key, each)
    allowed = [each for key, each in found.items() if resumed and key in config.allow_changed]
    refused = [each for each in found.values() if each not in allowed]
    if unknown:
        logger.warning("%s: could not be compared with this run: %s", before.folder, ", ".join(unknown))
    if refused:
        first, *others = refused
        texts = [f"{first.key}: the run in {before.folder} {first.text}"]
        texts += [f"{each.key}: it {each.text}" for each in others]
        keys = [each.key for each in refused]
        may = resumed and set(keys) <= set(ALLOWED_CHANGES)
        hint = f"set allow_changed={','.join(keys)} to resume anyway; " if may else ""
        raise ArgumentError(f"{'; '.join(texts)}; {hint}{_ADVICE}")
    for key, text in allowed:
        logger.warning("allow_changed: %s: the run in %s %s", key, before.folder, text)
    for key in ("versions", "processes"):
        then, now = _at(before.record, key), here[key]
        if isinstance(then, dict) and then != now:
            names = [name for name in now if then.get(name) != now[name]]
            changed = ", ".join(f"{name} {shown(then.get(name))} then, {now[name]} now" for name in names)
            logger.info("%s: %s", before.folder, changed)
    return [f"{key}: {text}" for key, text in allowed]


def _differences(before: Earlier, here: dict[str, Any], model: Any, unknown: list[str]) -> Iterator[Difference]:
    """Yield every difference; append to ``unknown`` what cannot be compared."""
    if not before.settings:
        unknown.append("the settings")
    for key, now in here["settings"].items():
        if key not in (*_FREE_KEYS, *_NAMES) and before.knows(key) and before.setting(key) != now:
            yield _changed(key, before.setting(key), now)
    yield from _content(before, here, unknown)
    yield from _model(before, here, model, unknown)


def _changed(key: str, then: Any, now: Any) -> Difference:
    return Difference(key, f"has {shown(then)}, this one {shown(now)}")


def _named(key: str, before: Earlier, here: dict[str, Any], unknown: list[str]) -> Iterator[Difference]:
    """Compare a path whose content was not recorded."""
    unknown.append(f"the content of {key}")
    if key in before.settings and before.settings[key] != here["settings"][key]:
        yield _changed(key, before.settings[key], here["settings"][key])


def _content(before: Earlier, here: dict[str, Any], unknown: list[str]) -> Iterator[Difference]:
    data = before.record.get("data")
    if not isinstance(data, dict):
        yield from _named("data", before, here, unknown)
        if before.knows("dev_data") and before.setting("dev_data") != here["settings"]["dev_data"]:
            yield _changed("dev_data", before.setting("dev_data"), here["settings"]["dev_data"])
    else:
        for part, key in (("train", "data"), ("dev", "dev")):
            then, now = data.get(part), here["data"][part]
            if then != now:
                numbers = f"{_at(then, 'examples')} of them, this one {now['examples']}"
                risk = ", of which some may have been trained on" if part == "dev" and now["examples"] else ""
                yield Difference(key, f"has other {part} examples, {numbers}{risk}")
    then, now = before.record.get("init_checkpoint"), here["init_checkpoint"]
    if then is None:
        unknown.append("the weights that init_checkpoint gave")
    elif then != now and "given" not in (then, now):
        names = [values.get("init_checkpoint") for values in (before.settings, here["settings"])]
        same = f", both of {shown(names[0])}" if names[0] == names[1] else ""
        what = "none" if then == "fresh" else "other trained weights from it"
        yield Difference("init_checkpoint", f"has {what}{same}, this one begins with {shown(names[1])}")
    then = before.record.get("tokenizers")
    if then is not None and then != here["tokenizers"]:
        yield Difference("tokenizers", "has other ones, with other vocabularies or other tokens for a text")


def _model(before: Earlier, here: dict[str, Any], model: Any, unknown: list[str]) -> Iterator[Difference]:
    if not os.path.lexists(before.folder / CONFIG):  # the folder of a run that is not finished
        for part in PARTS:
            yield from _named(part, before, here, unknown)
        return
    with reading(str(before.folder), CONFIG):
        stored = LayAlignConfig.from_pretrained(before.folder)
    for key in _OF_THE_MODEL:
        then, now = getattr(stored, key, None), getattr(model.config, key, None)
        if then != now:
            yield _changed(key, then, now)
    for key in ("r", "lora_alpha"):
        then, now = ((each.lora or {}).get(key) for each in (stored, model.config))
        if then != now:
            yield _changed(f"lora.{key}", then, now)
    same_version = getattr(stored, "transformers_version", None) == transformers.__version__
    for part in PARTS:
        module, entries = getattr(model, part), (stored.frozen_fingerprints or {}).get(part)
        if not entries or any(reason_whole_is_not_here(parameter) for parameter in module.parameters()):
            yield from _named(part, before, here, unknown)
            continue
        with reading(str(before.folder), f"{CONFIG}: frozen_fingerprints"):
            problems = fingerprint.differences(entries, module, same_version)
        if same_version:  # another release may read the same configuration differently
            problems = fingerprint.settings_that_differ(getattr(stored, f"{part}_config"), module.config) + problems
        if problems:
            name = "LLM" if part == "llm" else part
            yield Difference(part, f"has another {name} than this one: {fingerprint.summary(problems)}")
