"""What LayAlign is compared with. Each method and each ablation is a set of settings of the same model.

``layalign train --baseline NAME`` and ``layalign experiment`` use them; ``layalign baselines`` prints the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layalign.utils.errors import ArgumentError, one_of, refuse
from layalign.utils.pages import print_or_write

__all__ = ["BASELINES", "Baseline", "baseline", "with_baseline"]

BOTH = ("translation", "task")
_LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}


@dataclass(frozen=True)
class Baseline:
    """A method to compare with.

    Attributes:
        name: its name on the command line.
        label: its name in tables.
        what: one sentence that describes it.
        source: where it comes from.
        settings: keys of :class:`layalign.training.TrainConfig` that define it.
        stages: its training stages, in order; empty for the LLM alone.
    """

    name: str
    label: str
    what: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = BOTH


_LAYALIGN = "LayAlign (Ruan et al., 2025)"
_FUSED = "Puranegedara et al. (2025); theirs has one linear map after the sum, and English task data only"
_METHODS = (
    Baseline(
        "llm", "LLM alone", "The frozen LLM reads the prompt as text. Nothing is trained.", "every paper named here",
        {"use_adapter": False, "language_layers": []}, (),
    ),
    Baseline(
        "lora", "LoRA on the LLM",
        "The LLM reads the prompt as text; LoRA on its attention projections is trained on the task.",
        "LoRA (Hu et al., 2022)", {"use_adapter": False, "language_layers": [], "lora": _LORA}, ("task",),
    ),
    Baseline(
        "langbridge", "LangBridge-style",
        "The adapter's soft tokens, from the encoder's last layer, replace the prompt. Trained in both stages, as "
        "LayAlign's authors trained it for their comparison. LangBridge itself has one linear map, English task data "
        "only and no translation stage.",
        "LangBridge (Yoon et al., 2024); LayAlign, section 4.1", {"language_layers": [], "use_prompt": False},
    ),
    Baseline(
        "mindmerger-soft", "MindMerger-Soft",
        "The adapter's soft tokens, from the encoder's last layer, come before the prompt. The same as LayAlign "
        "without its aligner and gates.",
        "MindMerger (Huang et al., 2024); LayAlign, table 4", {"language_layers": []},
    ),
    Baseline(
        "mindmerger-matched", "MindMerger-Soft, as many parameters",
        "MindMerger-Soft with a wider adapter, so that it trains as many parameters as LayAlign.",
        "ours: what more parameters are worth", {"language_layers": [], "adapter_size": "match"},
    ),
    Baseline(
        "fused-softmax", "layers fused, one weight each",
        "The adapter's soft tokens, from a sum of all encoder layers with learned softmax weights, come before the "
        "prompt.",
        _FUSED, {"language_layers": [], "adapter_fusion": "softmax"},
    ),
    Baseline(
        "fused-token-softmax", "layers fused, weights by token",
        "The same, but a small transformer layer computes separate weights for each source token.",
        _FUSED, {"language_layers": [], "adapter_fusion": "token-softmax"},
    ),
    Baseline(
        "layalign", "LayAlign",
        "Soft tokens before the prompt, and every LLM layer attends, through a learned gate, to its own mix of all "
        "encoder layers but the last.",
        _LAYALIGN,
    ),
    Baseline(
        "layalign-fused-softmax", "LayAlign, layers fused",
        "LayAlign with the soft tokens of fused-softmax.", "ours: the two together",
        {"adapter_fusion": "softmax"},
    ),
    Baseline(
        "layalign-fused-token-softmax", "LayAlign, layers fused by token",
        "LayAlign with the soft tokens of fused-token-softmax.", "ours: the two together",
        {"adapter_fusion": "token-softmax"},
    ),
)  # fmt: skip
_ABLATIONS = (
    Baseline(
        "no-adapter", "no adapter", "Aligner and gates only: no soft tokens.", f"{_LAYALIGN}, table 4",
        {"use_adapter": False},
    ),
    Baseline(
        "shared-mix", "one shared mix", "One mix for the keys and one for the values of all LLM layers.",
        "ours: what layer-wise mixes are worth", {"mix": "shared"},
    ),
    Baseline(
        "no-prompt", "no prompt", "The encoder's soft tokens replace the prompt.", f"{_LAYALIGN}, table 4",
        {"use_prompt": False},
    ),
    Baseline(
        "last-layer", "last encoder layer only", "Aligner over the encoder's last layer.", f"{_LAYALIGN}, tables 7, 11",
        {"encoder_layers": "last"},
    ),
    Baseline(
        "first-third", "first third of the layers", "Aligner over the first third of the encoder's layers.",
        f"{_LAYALIGN}, tables 7, 11", {"encoder_layers": "first-third"},
    ),
    Baseline(
        "middle-third", "middle third of the layers", "Aligner over the middle third of the encoder's layers.",
        f"{_LAYALIGN}, tables 7, 11", {"encoder_layers": "middle-third"},
    ),
    Baseline(
        "last-third", "last third of the layers", "Aligner over the last third of the encoder's layers but the last.",
        f"{_LAYALIGN}, tables 7, 11", {"encoder_layers": "last-third"},
    ),
    Baseline(
        "all-layers", "all encoder layers", "Aligner over every layer, including the embeddings and the last one.",
        "ours", {"encoder_layers": "all"},
    ),
    Baseline(
        "fixed-gate", "gates fixed at 1", "The cross-attention term is added unscaled; no gate is learned.",
        f"{_LAYALIGN}, section 4.3: without gates its training loss did not fall", {"fixed_gate": 1.0},
    ),
    Baseline(
        "mlp", "MLP aligner", "A ReLU and a second linear map after the aligner's projection.",
        f"{_LAYALIGN}, published code", {"structure": "MLP"},
    ),
    Baseline("no-translation", "no translation stage", "Only the task stage.", f"{_LAYALIGN}, table 4", {}, ("task",)),
    Baseline("no-task", "no task stage", "Only the translation stage.", f"{_LAYALIGN}, table 4", {}, ("translation",)),
)  # fmt: skip
BASELINES: dict[str, Baseline] = {entry.name: entry for entry in (*_METHODS, *_ABLATIONS)}


def baseline(name: str) -> Baseline:
    """The baseline with this name.

    Raises:
        ArgumentError: there is no such baseline.
    """
    one_of("baseline", name, BASELINES)
    return BASELINES[name]


def with_baseline(values: Mapping[str, Any], name: str, stage: str, *, own_folders: bool = False) -> dict[str, Any]:
    """Settings of a training stage, overridden by those of a baseline.

    Args:
        values: keys of :class:`layalign.training.TrainConfig`.
        name: name of the baseline.
        stage: "translation" or "task".
        own_folders: whether to insert the baseline's name into `output_dir` and `init_checkpoint`: a/b/stage becomes
            a/b/NAME/stage. Meant for folders that the user did not choose, such as a preset's.

    Raises:
        ArgumentError: the baseline is unknown, or has no such stage.
    """
    chosen = baseline(name)
    if not isinstance(values, Mapping):
        refuse("values", "a mapping of keys to values", values)
    one_of("stage", stage, BOTH)
    if stage not in chosen.stages:
        has = f"only the {chosen.stages[0]} stage" if chosen.stages else "no stage, since nothing of it is trained"
        raise ArgumentError(f"baseline: {name} has {has}, got {stage}")
    merged = {**values, **chosen.settings, "baseline": name}
    for key in ("output_dir", "init_checkpoint") if own_folders else ():
        if values.get(key):
            folder = Path(str(values[key]))
            merged[key] = str(folder.parent / name / folder.name)
    if "translation" not in chosen.stages:
        merged.pop("init_checkpoint", None)
    return merged


# The table in the documentation

BEGIN, END = "<!-- baselines -->", "<!-- end of baselines -->"


def _shown(settings: Mapping[str, Any]) -> str:
    def one(key: str, value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{key}: {{{', '.join(one(k, v) for k, v in value.items() if v)}}}"
        return f"{key}: {str(value).lower() if isinstance(value, bool) else value}"

    return "; ".join(f"`{one(key, value)}`" for key, value in settings.items()) or "the defaults"


def markdown() -> str:
    """All baselines as a table."""
    lines = ["| name | what it is | settings | stages | source |", "|---|---|---|---|---|"]
    for entry in BASELINES.values():
        stages = ", ".join(entry.stages) or "none"
        lines.append(f"| `{entry.name}` | {entry.what} | {_shown(entry.settings)} | {stages} | {entry.source} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print_or_write(BEGIN, END, markdown)
