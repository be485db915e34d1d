"""The training configuration: one dataclass whose errors name the key.

The defaults are those of the published training scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any

import yaml

from layalign.modeling.layers import named_layers
from layalign.modeling.names import with_gguf
from layalign.utils.errors import ArgumentError, one_of, refuse, shown
from layalign.utils.files import write_whole

STAGES = ("translation", "task")
TASKS = ("math", "x-csqa", "xnli")
LEARNING_RATES = {"translation": 4e-5, "task": 3e-5}
MAX_MICRO_BATCH = 8
LARGEST = 2**62  # of any number
SEEDS = 2**32  # numpy's limit

_CHOICES: dict[str, tuple[str, ...]] = {
    "stage": STAGES,
    "task": TASKS,
    "structure": ("Linear", "MLP"),
    "mix": ("layer-wise", "shared"),
    "adapter_fusion": ("softmax", "token-softmax"),
    "frozen_dtype": ("auto", "stored", "float32", "bfloat16", "float16"),
    "dev_cut": ("sentence", "position"),
    "dev_overlap": ("warn", "drop"),
    "sharding": ("fsdp2", "zero2", "zero3"),
}
# Whole numbers that may be 0; others are at least 1.
_FROM_ZERO = (
    "dev_size", "eval_steps", "save_steps", "num_workers", "max_skipped_steps", "seed", "llm_bos_token_id",
)  # fmt: skip
# Keys that take true, false or this word.
_FLAGS_OR = {"bf16": "auto", "progress": "quiet"}
# Keys that a resumed run may change on request. Never those that define the model, nor the dev examples: some of the
# new ones may have been trained on.
ALLOWED_CHANGES = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "baseline", "batch_size", "bf16", "data", "dev_overlap",
    "encoder_dropout", "fixed_gate", "frozen_dtype", "gradient_checkpointing", "group_by_length", "init_checkpoint",
    "languages", "learning_rate", "limit",
    "lr_scheduler", "max_grad_norm", "max_prompt_length", "max_source_length", "max_target_length", "micro_batch_size",
    "seed", "skip_bad", "tokenizers", "warmup_ratio", "weight_decay",
)  # fmt: skip
TEXTS = ("encoder", "llm", "gguf_file", "output_dir", "init_checkpoint", "lr_scheduler", "baseline")
_LORA_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": None}


@dataclass
class TrainConfig:
    """All settings of one stage. None is the published value for the stage and task, unless noted otherwise.

    Raises:
        ArgumentError: on construction, for a value of the wrong type or out of range; the text starts with the key.
    """

    # Model. `encoder` and `llm` are folders or hub names; `llm` may also be a GGUF file. `gguf_file` names a file in
    # the LLM's folder or hub repository and is merged into `llm`. `baseline` records where the settings come from.
    encoder: str | None = None
    llm: str | None = None
    gguf_file: str | None = None
    baseline: str | None = None
    encoder_layers: list[int] | str | None = None
    language_layers: list[int] | None = None
    structure: str = "Linear"
    mix: str = "layer-wise"
    use_adapter: bool = True
    adapter_size: int | str | None = None  # "match": train as many parameters as LayAlign with its aligner does
    adapter_fusion: str | None = None
    use_prompt: bool = True
    fixed_gate: float | None = None
    mask_encoder_padding: bool = True
    # First token of the LLM's input. None: the one that its tokenizer adds; false: none; a number: this token.
    llm_bos_token_id: int | bool | None = None
    # auto: bfloat16 if `bf16` is on, else the dtype of the checkpoint on disk ("stored").
    frozen_dtype: str = "auto"
    # Dropout of the frozen encoder in training. true: as in its own configuration; false: none; a number: this rate.
    # None: as the checkpoint was trained, or true (as published) for a new model.
    encoder_dropout: bool | float | None = None
    lora: dict[str, Any] | None = None
    init_checkpoint: str | None = None

    # Data.
    stage: str = "translation"
    task: str = "math"
    data: Any = "datas"
    languages: list[str] | None = None
    limit: int | None = None
    # Size of the dev split: examples cut from `data`, or the most used of `dev_data`.
    dev_size: int = 3000
    dev_data: Any = None
    # How dev is cut from `data`. sentence: no English sentence of dev stays in training. position: the first `dev_size`
    # examples, as published. None: sentence; a resumed run keeps its cut.
    dev_cut: str | None = None
    # Training examples whose English sentence is also in `dev_data`. warn: keep them and warn; drop: skip them.
    dev_overlap: str = "warn"
    skip_bad: bool = False
    max_source_length: int | None = None
    max_prompt_length: int | None = None
    max_target_length: int | None = None

    # Optimization.
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 128
    micro_batch_size: int | None = None
    eval_batch_size: int | None = None
    learning_rate: float | None = None
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 3e-7
    adam_beta1: float = 0.8
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    # How many steps with a NaN or a loss spike may be skipped. After that a NaN stops the run, a spike only warns.
    max_skipped_steps: int = 0
    # A loss above this times the median of the last hundred steps is a spike. 0: spikes are not looked for.
    spike_factor: float = 4.0
    bf16: bool | str = "auto"  # auto: if the processor computes in bf16
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    seed: int = 0
    use_cpu: bool = False
    num_workers: int = 0
    sharding: str | None = None  # None: as the launcher configures it (torchrun: DDP)

    # Output. eval_steps and save_steps: None is once per epoch, 0 is never.
    output_dir: str = "outputs"
    # auto: resume from the newest complete checkpoint in `output_dir`; false: start over; or a checkpoint folder.
    resume: str | bool = "auto"
    # Keys in which a resumed run may differ from its checkpoint.
    allow_changed: list[str] = field(default_factory=list)
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2
    keep_best: bool = False
    report_to: list[str] = field(default_factory=list)
    # true: a progress bar; false: a plain line for each logged step and evaluation; quiet: neither.
    progress: bool | str = True

    def __post_init__(self) -> None:
        _coerce(self)
        _check_ranges(self)
        if self.gguf_file is not None:
            if self.llm is None:
                raise ArgumentError("gguf_file: expected llm, the folder or hub name that contains it, to be set too")
            self.llm, self.gguf_file = with_gguf(self.llm, self.gguf_file), None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.stage]
        longest = 512 if self.stage == "task" and self.task == "math" else 200
        for name in ("max_source_length", "max_prompt_length", "max_target_length"):
            if getattr(self, name) is None:
                setattr(self, name, longest)

    def batch_plan(self, world_size: int = 1) -> tuple[int, int]:
        """Split `batch_size` over processes: (micro batch of one process, gradient accumulation steps).

        Raises:
            ArgumentError: `batch_size` is not divisible that way.
        """
        if self.batch_size % world_size:
            raise ArgumentError(
                f"batch_size: expected a multiple of the {world_size} processes of this run, got {self.batch_size}"
            )
        share = self.batch_size // world_size
        micro = self.micro_batch_size
        if micro is None:
            micro = max(size for size in range(1, min(MAX_MICRO_BATCH, share) + 1) if share % size == 0)
        if share % micro:
            raise ArgumentError(
                f"micro_batch_size: expected a divisor of {share} (batch_size {self.batch_size} over {world_size} "
                f"process(es)), got {micro}"
            )
        return micro, share // micro

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML or JSON."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The configuration as YAML; `layalign.training.load_train_config` reads it back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write the configuration as YAML.

        Raises:
            OutputError: it cannot be written.
        """
        write_whole(Path(path), self.to_yaml())


def require_config(config: Any) -> None:
    """Raise an ArgumentError unless `config` is a TrainConfig."""
    if not isinstance(config, TrainConfig):
        refuse("config", "a TrainConfig; see load_train_config", config)


def _coerce(config: TrainConfig) -> None:
    """Check the type of every value and turn numbers in text into numbers (YAML reads 4e-5 as text)."""
    for entry in fields(TrainConfig):
        name, value = entry.name, getattr(config, entry.name)
        kind, *others = str(entry.type).split(" | ")
        if (value is None and "None" in others) or (value is False and "bool" in others):
            continue
        if isinstance(value, str) and (name, value) == ("adapter_size", "match"):
            continue
        if kind == "int":
            value = _number(name, value, whole=True, least=0 if name in _FROM_ZERO else 1)
        elif kind == "float":
            value = _number(name, value, whole=False, least=-inf if name == "fixed_gate" else 0.0)
        elif name in _FLAGS_OR:
            if not isinstance(value, bool) and value != _FLAGS_OR[name]:
                raise ArgumentError(f"{name}: expected true, false or {_FLAGS_OR[name]}, got {shown(value)}")
        elif name == "encoder_dropout":
            if not isinstance(value, bool):
                value = _number(name, value, whole=False, expected="true, false or a rate below 1") or False
        elif kind == "bool":
            if not isinstance(value, bool):
                raise ArgumentError(f"{name}: expected true or false, got {shown(value)}")
        elif kind.startswith("list"):
            if name != "encoder_layers" or not isinstance(value, str):
                value = _list(name, value, int if kind == "list[int]" else str)
        elif name in TEXTS:
            if not isinstance(value, (str, Path)):
                raise ArgumentError(f"{name}: expected text, got {shown(value)}")
            value = str(value)
        elif name in _CHOICES:
            one_of(name, value, _CHOICES[name])
        setattr(config, name, value)
    config.data = _data("data", config.data)
    config.dev_data = None if config.dev_data is None else _data("dev_data", config.dev_data)
    if config.lora is not None:
        config.lora = _lora_settings(config.lora)
    if config.resume is True:
        config.resume = "auto"
    if config.resume is not False and not isinstance(config.resume, str):
        raise ArgumentError(f"resume: expected auto, false or a checkpoint folder, got {shown(config.resume)}")


def _data(name: str, value: Any) -> Any:
    if not isinstance(value, (str, Path, Mapping, list)) or not value:
        raise ArgumentError(f"{name}: expected a path, FORMAT:PATH, a mapping or a list of these, got {shown(value)}")
    return str(value) if isinstance(value, Path) else value


def _number(name: str, value: Any, *, whole: bool, least: float = -inf, expected: str = "") -> Any:
    expected, number = expected or ("a whole number" if whole else "a number"), float("nan")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ArgumentError(f"{name}: expected {expected}, got {shown(value)}")
    try:
        number = float(value)
        if whole and not isinstance(value, float):  # a float would round a large integer
            number = int(value)
    except (ValueError, OverflowError):
        pass  # a text such as 1e3 may still be a whole number
    if not isinstance(number, int) and (not isfinite(number) or (whole and number != int(number))):
        raise ArgumentError(f"{name}: expected {expected}, got {shown(value)}")
    number = int(number) if whole else number
    if abs(number) > LARGEST:
        raise ArgumentError(f"{name}: expected {expected} up to {LARGEST:.3g}, got {shown(value)}")
    if number < least:
        raise ArgumentError(f"{name}: expected at least {least:g}, got {number:g}")
    return number


def _list(name: str, value: Any, kind: type) -> list[Any]:
    if isinstance(value, str) and kind is str:
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)) or any(isinstance(v, bool) or not isinstance(v, kind) for v in value):
        what = "whole numbers" if kind is int else "names"
        raise ArgumentError(f"{name}: expected a list of {what}, got {shown(value)}")
    return list(value)


def _lora_settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"lora: expected a mapping such as {{r: 8, lora_alpha: 16}}, got {shown(value)}")
    for key in value:
        if key not in _LORA_DEFAULTS:
            raise ArgumentError(f"lora.{key}: expected one of {', '.join(_LORA_DEFAULTS)}")
    settings = {**_LORA_DEFAULTS, **value}
    for key in ("r", "lora_alpha"):
        settings[key] = _number(f"lora.{key}", settings[key], whole=True, least=1)
    targets = settings["target_modules"]
    if targets is not None and not isinstance(targets, str):
        settings["target_modules"] = _list("lora.target_modules", targets, str)
    settings["lora_dropout"] = _number("lora.lora_dropout", settings["lora_dropout"], whole=False)
    if not 0 <= settings["lora_dropout"] < 1:
        raise ArgumentError(f"lora.lora_dropout: expected at least 0 and below 1, got {settings['lora_dropout']}")
    return settings


def _check_ranges(config: TrainConfig) -> None:
    if config.seed >= SEEDS:
        raise ArgumentError(f"seed: expected a whole number below {SEEDS}, got {config.seed}")
    for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
        if getattr(config, name) >= 1:
            raise ArgumentError(f"{name}: expected at least 0 and below 1, got {getattr(config, name):g}")
    for name in ("epochs", "learning_rate"):
        if getattr(config, name) == 0:
            raise ArgumentError(f"{name}: expected more than 0, got 0")
    rate = config.encoder_dropout
    if rate is not None and not isinstance(rate, bool) and not 0 <= rate < 1:
        raise ArgumentError(f"encoder_dropout: expected true, false or a rate below 1, got {rate:g}")
    if 0 < config.spike_factor <= 1:
        raise ArgumentError(f"spike_factor: expected more than 1, or 0 to disable it, got {config.spike_factor:g}")
    for name in ("encoder_layers", "language_layers"):
        layers = getattr(config, name)
        if isinstance(layers, str):
            named_layers(layers, 100)  # raises for an unknown name
        elif layers is not None and (len(set(layers)) != len(layers) or any(layer < 0 for layer in layers)):
            raise ArgumentError(f"{name}: expected distinct numbers from 0 up, got {layers}")
    for key in config.allow_changed:
        if key not in ALLOWED_CHANGES:
            raise ArgumentError(f"allow_changed: expected some of {', '.join(ALLOWED_CHANGES)}, got {shown(key)}")
    if config.keep_best and (config.eval_steps == 0 or config.dev_size == 0):
        raise ArgumentError(
            "keep_best: expected a dev split and evaluation during training, got dev_size or eval_steps 0"
        )
    if config.dev_data is not None and config.dev_size == 0:
        raise ArgumentError("dev_size: expected at least 1 with dev_data (how many of its examples are used), got 0")
    if config.keep_best and config.save_steps not in (None, config.eval_steps):
        raise ArgumentError(
            f"save_steps: expected that of eval_steps ({config.eval_steps}) with keep_best, got {config.save_steps}"
        )
