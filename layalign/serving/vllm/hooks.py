"""What vLLM's configuration becomes for a LayAlign checkpoint, and what is refused at the start."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from layalign.utils.errors import ArgumentError


class ServedModel(VerifyAndUpdateConfig):
    """Checks of a server's settings; vLLM calls them before it loads a model."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the model's settings.

        Raises:
            ArgumentError: a setting cannot be honoured; the text names it.
        """
        model_config.hf_config.serve_settings  # noqa: B018  # raises for a bad one
        if model_config.skip_tokenizer_init:
            raise ArgumentError("skip_tokenizer_init: expected false, requests are texts")

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the engine's settings.

        Raises:
            ArgumentError: a setting cannot be honoured; the text names it.
        """
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ArgumentError("pipeline_parallel_size: expected 1; use tensor or data parallelism")
        if vllm_config.lora_config is not None:
            raise ArgumentError("enable_lora: expected false; LoRA of a checkpoint is merged when it is loaded")
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ArgumentError("disable_hybrid_kv_cache_manager: expected false, sources are cached apart from text")
        if vllm_config.speculative_config is not None:
            raise ArgumentError("speculative_config: expected none, a draft model does not read the source")
