"""LayAlign checkpoints on vLLM: a plugin that vLLM finds by its entry point and loads in every process.

`vllm serve FOLDER` and `vllm.LLM(FOLDER)` need nothing else. Offline requests are made by :func:`source_prompt`.
"""

from __future__ import annotations

import logging
from typing import Any

ARCHITECTURE = "LayAlignForCausalLM"
MODALITY = "source"
logger = logging.getLogger("layalign")


def register() -> None:
    """Register the model with the vLLM of this process. May be called again.

    vLLM calls it in every process, for other models too. Outside the range of versions that were run it only warns.
    """
    from layalign.serving.vllm import compat

    if (why := compat.reason_against()) is not None:
        logger.warning("layalign: LayAlign checkpoints are not served here: %s", why)
        return
    compat.install(ARCHITECTURE, "layalign.serving.vllm.model:LayAlignForCausalLM")


def source_prompt(
    text: str, *, language: str | None = None, task: str | None = None, llm_prompt: str | None = None
) -> dict[str, Any]:
    """A request for ``vllm.LLM.generate``, with the fields of the server's requests.

    Args:
        text: for the encoder, in its language.
        language: name or code of its language, which encoders such as NLLB need. None: the server's.
        task: name of the prompt that the LLM gets too ("none", "math", "source"). None: the server's.
        llm_prompt: the LLM's prompt itself, in place of a task; "{source}" in it stands for the text.

    Returns:
        The prompt. Errors in it are raised by ``generate``.
    """
    fields = {"text": text, "language": language, "task": task, "llm_prompt": llm_prompt}
    return {"prompt_token_ids": [], "multi_modal_data": {MODALITY: {k: v for k, v in fields.items() if v is not None}}}
