"""Converts published checkpoints to our format and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layalign.modeling.model import LayAlignForCausalLM
from layalign.published import names as published
from layalign.utils.errors import CheckpointError
from layalign.utils.lock import held


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion read and wrote.

    Attributes:
        output: the folder or file that was written.
        encoder_layers, language_layers, structure: those of the aligner.
        frozen_saved: whether encoder and LLM were written too. They are if they differ from the named ones.
        weights: number of tensors written.
    """

    output: Path
    encoder_layers: list[int]
    language_layers: list[int]
    structure: str
    frozen_saved: bool
    weights: int


def convert_published(
    checkpoint: str | Path,
    encoder: str,
    llm: str,
    output_dir: str | Path,
    *,
    encoder_layers: Sequence[int] | None = None,
    language_layers: Sequence[int] | None = None,
    **config: Any,
) -> ConversionReport:
    """Turn a published ``pytorch_model.bin`` into a folder for ``LayAlignForCausalLM.from_pretrained``.

    Args:
        checkpoint: the published file; read with ``weights_only=True``.
        encoder, llm: names or folders of the frozen parts it was trained with.
        output_dir: where to write.
        encoder_layers: indices into the encoder's hidden states. The file does not contain them. The default 0..E-1 is
            that of every published preset.
        language_layers: LLM layers. The file contains them; what is given here is compared with it.
        **config: further fields of ``layalign.LayAlignConfig`` (``mask_encoder_padding`` is False as published).

    Raises:
        ArgumentError: another run is writing into `output_dir`.
        CheckpointError: the file is damaged, or does not fit the frozen parts.
    """
    state = published.load_bin(checkpoint)
    layers, count, structure = _read_aligner(checkpoint, state)
    if language_layers is not None and list(language_layers) != layers:
        raise CheckpointError(f"language_layers: the checkpoint has gates at {layers}, got {list(language_layers)}")
    if encoder_layers is not None and len(encoder_layers) != count:
        raise CheckpointError(f"encoder_layers: the checkpoint mixes {count} layers, got {list(encoder_layers)}")
    settings: dict[str, Any] = {"mask_encoder_padding": False, **config}
    model = LayAlignForCausalLM.from_encoder_and_llm(
        encoder,
        llm,
        encoder_layers=list(range(count)) if encoder_layers is None else list(encoder_layers),
        language_layers=layers,
        structure=structure,
        **settings,
    )
    ours = published.from_published(model, state)
    changed = _put(checkpoint, model, ours)
    with held(output_dir):
        model.save_pretrained(output_dir, save_frozen=changed)
    assert model.config.encoder_layers is not None
    return ConversionReport(
        Path(output_dir), model.config.encoder_layers, layers, structure, bool(model.config.frozen_saved), len(ours)
    )


def convert_to_published(model_dir: str | Path, output_file: str | Path) -> ConversionReport:
    """Turn a checkpoint of ours into a whole published ``pytorch_model.bin``.

    Raises:
        CheckpointError: the folder is not a checkpoint of ours, or the published format cannot hold it.
    """
    model = LayAlignForCausalLM.from_pretrained(str(model_dir))
    config = model.config
    own = config.lora is not None or config.mix != "layer-wise"
    own = own or config.adapter_size is not None or config.adapter_fusion is not None
    if own or not config.language_layers or not config.use_adapter:
        raise CheckpointError(
            f"{model_dir}: the published format has an adapter of one size over the encoder's last states, a "
            "layer-wise aligner, no LoRA"
        )
    state = published.to_published(model, model.state_dict())
    Path(output_file).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{output_file}.unfinished")
    torch.save(state, unfinished)
    unfinished.replace(output_file)  # never half a file under the final name
    return ConversionReport(
        Path(output_file), config.encoder_layers, config.language_layers, config.structure, True, len(state)
    )


def _read_aligner(checkpoint: Any, state: dict[str, Tensor]) -> tuple[list[int], int, str]:
    """(language layers, number of encoder layers, structure) as the tensors show them."""
    gate = re.compile(re.escape(published.LLM_PREFIX) + r".*\.(\d{1,6})\.[^.]+\.adaption_gate$")
    layers = [int(match[1]) for match in map(gate.match, state) if match]
    mix = state.get("encoder_aligner.projector.fc1.weight")
    if mix is None or not layers:
        raise CheckpointError(f"{checkpoint}: not a published LayAlign checkpoint: it has no aligner or no gates")
    if mix.dim() != 2 or mix.shape[0] != 2 * len(layers):
        raise CheckpointError(
            f"{checkpoint}: expected fc1 with {2 * len(layers)} rows for {len(layers)} gates, got {tuple(mix.shape)}"
        )
    structure = "MLP" if "encoder_aligner.projector.fc3.weight" in state else "Linear"
    return layers, mix.shape[1], structure


def _put(checkpoint: Any, model: LayAlignForCausalLM, weights: dict[str, Tensor]) -> bool:
    """Load all weights. True if the frozen parts differ from the named ones: they were trained too."""
    own = model.state_dict()
    missing, foreign = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or foreign:
        problem = f"{missing[0]} is missing" if missing else f"there is no place for {foreign[0]}"
        raise CheckpointError(f"{checkpoint}: does not fit these frozen parts: {problem}")
    changed = False
    for name, tensor in weights.items():
        if own[name].shape != tensor.shape:
            shapes = f"expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            raise CheckpointError(f"{checkpoint}: does not fit these frozen parts: {name}: {shapes}")
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(f"{checkpoint}: {name}: expected floating numbers, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{checkpoint}: {name}: expected finite numbers, got NaN or infinity")
        if name.startswith(("encoder.", "llm.")):  # compared in the coarser of the two dtypes: files may be bf16
            changed |= not torch.equal(own[name].to(tensor.dtype).float(), tensor.float())
    for name, tensor in weights.items():
        if changed or not name.startswith(("encoder.", "llm.")):
            own[name].copy_(tensor)
    return changed
