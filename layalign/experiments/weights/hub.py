"""The two models from the hub, at a fixed revision and with a known checksum of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layalign.training.checkpoints import sha256
from layalign.utils.errors import DataError, first_line
from layalign.utils.quiet import without_reports

# No code, and only one copy of the weights.
_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "model.safetensors"]
_SECONDS = 5.0  # timeout for checking whether the hub is reachable


@dataclass(frozen=True)
class HubModel:
    """A model at one revision, with size and checksum of its weights."""

    name: str
    revision: str
    size: int
    sha256: str

    def record(self) -> dict[str, str | int]:
        """Where it came from, for the manifest."""
        return {
            "model": self.name, "revision": self.revision, "file": "model.safetensors", "bytes": self.size,
            "sha256": self.sha256,
        }  # fmt: skip


MODELS = {
    "encoder": HubModel(
        "intfloat/multilingual-e5-small", "614241f622f53c4eeff9890bdc4f31cfecc418b3",
        470_641_600, "1a55775f53449dac10a2bcbc312469fac40b96d53198c407081a831f81c98477",
    ),
    "llm": HubModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        269_060_552, "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    ),
}  # fmt: skip


def reason_against(model: HubModel) -> str | None:
    """Why a model is not available from the hub; None if it is, or if it is in the hub's cache."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model.name, "model.safetensors", revision=model.revision), str):
        return None
    try:
        HfApi().model_info(model.name, revision=model.revision, timeout=_SECONDS)
    except Exception as error:  # no network, unknown host, offline mode, access denied
        return first_line(error, 120)
    return None


def fetch(model: HubModel) -> Path:
    """Download a model's files; returns their folder in the hub's cache.

    Raises:
        DataError: the download failed, or the weights have another size or checksum.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, allow_patterns=_FILES))
    except Exception as error:
        raise DataError(f"hub: {model.name} cannot be downloaded: {first_line(error)}") from error
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise DataError(f"hub: {model.name}: expected model.safetensors in {folder}")
    size, found = weights.stat().st_size, sha256(weights)
    if size != model.size or found != model.sha256:
        raise DataError(
            f"{weights}: expected {model.size} bytes with the SHA-256 {model.sha256}, got {size} with {found}"
        )
    return folder


def model_and_tokenizer(part: str, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer. The encoder has no pooler and no dropout, like that from the packages."""
    from transformers import AutoTokenizer, BertModel, LlamaForCausalLM

    with without_reports():
        if part == "encoder":
            model = BertModel.from_pretrained(
                folder, dtype=dtype, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
        else:
            model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
