"""Reading YAML files: data only, no Python objects. Whatever is wrong with a file is an ArgumentError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from layalign.utils import reading
from layalign.utils.errors import ArgumentError
from layalign.utils.limits import MAX_YAML_CHARACTERS, MAX_YAML_DEPTH, MAX_YAML_VALUES


def read_file(path: Path, argument: str = "config") -> Any:
    """The value that a YAML file holds; see :func:`read_text`."""
    where = f"{argument}: {path}"
    text = reading.read_text(path, where=where, most=4 * MAX_YAML_CHARACTERS, error=ArgumentError)
    return read_text(text, where)


def read_text(text: str, where: str) -> Any:
    """The value of a YAML text, without running anything: tags of Python objects are errors.

    Args:
        where: begins the error's text.

    Raises:
        ArgumentError: the text is not YAML, holds an impossible value (a 13th month), or is too large or too deep once
            all aliases are expanded.
    """
    if len(text) > MAX_YAML_CHARACTERS:
        raise ArgumentError(f"{where}: expected at most {MAX_YAML_CHARACTERS} characters, got {len(text)}")
    try:
        return yaml.load(text, _Loader)
    except _TooLargeError:
        raise ArgumentError(
            f"{where}: expected at most {MAX_YAML_VALUES} values, {MAX_YAML_DEPTH} lists or mappings deep"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # PyYAML's own constructors raise the others for invalid dates, numbers and tagged values.
        raise ArgumentError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}") from error


class _TooLargeError(Exception):
    pass


class _Loader(yaml.SafeLoader):
    """Counts values while it reads, with every alias expanded: what it builds later, merge keys too, is no larger."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # values in a finished node, and how deep
        self._begun = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the base class; raises as soon as the text is known to be too large."""
        self._begun += 1
        self._depth += 1
        is_alias = self.check_event(yaml.AliasEvent)
        if self._begun > MAX_YAML_VALUES or self._depth > MAX_YAML_DEPTH + 1:
            raise _TooLargeError
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if node not in self._sizes:  # the alias is inside its own anchor
                raise _TooLargeError
            return node
        inner = node.value if isinstance(node.value, list) else []
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in inner for each in pair]
        values = 1 + sum(self._sizes[each][0] for each in inner)
        depth = 1 + max((self._sizes[each][1] for each in inner), default=-1)
        if values > MAX_YAML_VALUES or depth > MAX_YAML_DEPTH:
            raise _TooLargeError
        self._sizes[node] = values, depth
        return node
