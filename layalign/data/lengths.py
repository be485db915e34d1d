"""How many tokens the two parts of a model can read."""

from __future__ import annotations

from typing import Any

from torch import nn

_NO_LIMIT = 1 << 30  # tokenizers without a limit give a number far above this


def known_limit(tokenizer: Any) -> int | None:
    """The most tokens that a model takes, by its tokenizer; None where the tokenizer has no limit."""
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT else None


def table_of_positions(part: Any) -> int | None:
    """Tokens that the learned tables of absolute positions in a module suffice for; None without any.

    RoBERTa counts positions from the padding's id + 1, BART from an offset; rows before that are not counted.
    """
    found = []
    for name, module in part.named_modules() if isinstance(part, nn.Module) else ():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in own or own == "wpe"):
            skipped = getattr(module, "offset", None)
            if skipped is None:
                skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - int(skipped))
    return min(found, default=None)


def positions(part: Any, config: Any) -> tuple[int | None, bool]:
    """(The most tokens that an encoder or an LLM was made for, whether it cannot read more at all).

    Rotary positions can be computed beyond what the model was trained for; T5's and NLLB's have no end: None.

    Args:
        part: the module.
        config: its configuration.
    """
    table = table_of_positions(part)
    if table is not None:
        return table, True
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    most = getattr(config, "max_position_embeddings", None)
    return (most if rotary is not None and isinstance(most, int) else None), False
