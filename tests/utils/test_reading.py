"""Files that are damaged or made to do harm: one error of ours that names the file, at once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from layalign.utils import limits, reading, yaml_files
from layalign.utils.errors import ArgumentError, CheckpointError, DataError

# Each line's mapping merges the one before nine times: 9^12 pairs of keys.
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 13))
ALIASES = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 13))
YAML: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b"a: 1\nb: \xff\xfe", ":2 is not UTF-8"),
    "null": (b"a: \0", "is not YAML"),
    "object": (b"a: !!python/object/apply:os.system [echo]", "is not YAML: could not determine a constructor"),
    "unknown tag": (b"!mine {a: 1}", "is not YAML"),
    "13th month": (b"a: 2026-13-01", "is not YAML"),
    "no such float": (b"a: 1:" + b"1:" * 5000 + b"1.5", "is not YAML"),
    "deep": (b"[" * 100_000, "expected at most 10000 values, 40 lists or mappings deep"),
    "deep, finished": (b"[" * 42 + b"]" * 42, "40 lists or mappings deep"),
    "deep by aliases": (
        b"a0: &a0 [1]\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (i, i, i - 1) for i in range(1, 60)), "40 lists or mappings"
    ),
    "deep blocks": (b"- " * 5000 + b"1", "40 lists or mappings deep"),
    "aliases": (ALIASES.encode(), "expected at most 10000 values"),
    "merge keys": (MERGED.encode(), "expected at most 10000 values"),
    "alias of itself": (b"a: &a [*a]", "expected at most 10000 values"),
    "merges itself": (b"&a {b: 1, <<: *a}", "expected at most 10000 values"),
    "many values": (b"[" + b"1," * 100_000 + b"]", "expected at most 10000 values"),
    "long": (b"a" * 2**19, "expected at most 262144 characters"),
    "longer": (b"a" * 2**21, "expected at most 1048576 bytes, got 2097152"),
}  # fmt: skip
JSON: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b'{\n"a": "\xff"}', ":2 is not UTF-8"),
    "cut": (b'{"a": [1,\n2', " is not JSON: line 2"),
    "empty": (b"", " is not JSON: line 1"),
    "digits": (b"[" + b"9" * 5000 + b"]", "is not JSON: Exceeds the limit"),
    "deep": (b"[" * 1_000_000, "expected at most 64 nested lists and mappings"),
    "deep, finished": (b'{"a":' * 65 + b"1" + b"}" * 65, "expected at most 64 nested lists and mappings"),
}


@pytest.mark.parametrize("kind", YAML)
def test_damaged_yaml(kind: str, tmp_path: Path) -> None:
    """Within five seconds of work, too: without a limit, the merge keys run until all memory is gone."""
    content, expected = YAML[kind]
    file = tmp_path / "train_config.yaml"
    file.write_bytes(content)
    begun = time.process_time()
    with pytest.raises(ArgumentError, match="config: .*train_config.yaml.*") as caught:
        yaml_files.read_file(file)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - begun < 5


def test_yaml_that_people_write() -> None:
    """Aliases and merge keys mean what they mean to PyYAML; a mapping at the limits is read."""
    text = "base: &b {x: 1, y: [1, 2]}\nother: {<<: *b, x: 2}\nboth: {<<: [*b, {z: 3}]}\nagain: *b\n"
    assert yaml_files.read_text(text, "it") == yaml.safe_load(text)
    longest = "[" + ",".join(["1"] * (limits.MAX_YAML_VALUES - 1)) + "]"
    assert len(yaml_files.read_text(longest, "it")) == limits.MAX_YAML_VALUES - 1
    deepest = "[" * 41 + "]" * 41
    assert yaml_files.read_text(deepest, "it") == yaml.safe_load(deepest)


@pytest.mark.parametrize("kind", JSON)
def test_damaged_json(kind: str, tmp_path: Path) -> None:
    content, expected = JSON[kind]
    file = tmp_path / "training.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"training\.json") as caught:
        reading.read_json(file)
    assert expected in str(caught.value)


def test_json_at_the_limits(tmp_path: Path) -> None:
    """Many lists beside each other are not deep."""
    wide: Any = [[{}] for _ in range(1000)]
    assert reading.parse_json(str(wide), "it") == wide
    deepest = "[" * limits.MAX_JSON_DEPTH + "]" * limits.MAX_JSON_DEPTH
    assert reading.parse_json(deepest, "it")
    (tmp_path / "a.json").write_text("[1, 2]")
    assert reading.read_json(tmp_path / "a.json", most=6) == [1, 2]
    with pytest.raises(DataError, match=r"what: expected at most 5 bytes, got 6"):
        reading.read_json(tmp_path / "a.json", most=5, where="what", error=DataError)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe is not opened: that would wait until somebody writes to it. A link to a file is one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, expected in {
        "pipe": "expected a file, got a pipe",
        "zero": "expected a file, got a device",
        "folder": "expected a file, got a folder",
        "loop": "cannot be read: Too many levels",
        "none": "cannot be read: No such file",
        "a\0b": "cannot be read: embedded null",
    }.items():
        with pytest.raises(CheckpointError, match=expected):
            reading.read_bytes(tmp_path / name)
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert reading.read_text(tmp_path / "link") == "text"


OUTSIDE = [
    "../a", "a/../../b", "/etc/passwd", "", ".", "./a", "a//b", "a/", "C:\\a", "C:a", "a\\..\\b", "a\0b", 3, None,
    ["a"], "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_a_folder(name: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest.json: expected the name of a file in its folder, got"):
        reading.confined(tmp_path, name, "manifest.json")


def test_names_within_a_folder(tmp_path: Path) -> None:
    for name in ("a", "global_step3/zero_pp_rank_0.pt", "..a", "a b", "ä"):
        assert reading.confined(tmp_path, name, "it") == tmp_path / name
