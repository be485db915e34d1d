"""A seeded mutator of bytes: the same bad files every time, hundreds of thousands of lines in seconds."""

from __future__ import annotations

import random
from collections.abc import Sequence

# What has broken readers before: ends of lines and files, encodings, numbers, nesting, quotes.
TOKENS: tuple[bytes, ...] = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\n\n", b"\t", b"\t\t", b'"', b"\\", b"'", b"\x1a",
    b"\xed\xa0\x80", b"\xc3", b"\xf5\x80\x80\x80", b"\xc0\xaf", b"\\ud800", b"\\udc00\\ud800", b"\\u0000",
    "\u2028\u2029\u0085\x0b\x0c".encode(), "\u202e\u200b\ufeff".encode(), "\U0001f9ff\u0301".encode(),
    "١٢٣٫٤".encode(), "−5".encode(), b"NaN", b"-Infinity", b"1e999", b"-0", b"0x1F", b"1_000", b"1e5", b".5",
    b"null", b"true", b"{}", b"[]", b"{", b"}", b"[", b"]", b",", b":", b" ", b"{}{}", b'{"a":1,"a":2}', b"#", b"../..",
    b"%s%n{0}", b"<script>", b"$(id)", b"!!python/object/apply:os.system [id]", b"&a [*a]", b"---\n", b"? ",
)  # fmt: skip
LARGE: tuple[bytes, ...] = (
    b"7" * 5000,
    b"[" * 20000,
    b'{"a":' * 3000,
    b"a" * 100_000,
    "ß".encode() * 30_000,
    b" " * 70_000,
)


def mutated(line: bytes, draw: random.Random, others: Sequence[bytes] = (), large: bool = True) -> bytes:
    """`line` with one to three things wrong with it; not `large`: none of them of thousands of bytes."""
    for _ in range(draw.randint(1, 3)):
        line = _once(line, draw, others, large)
    return line


def _once(line: bytes, draw: random.Random, others: Sequence[bytes], large: bool) -> bytes:
    kind = draw.randrange(9)
    at, end = sorted((draw.randint(0, len(line)), draw.randint(0, len(line))))
    if kind == 0 and line:  # one bit
        at = draw.randrange(len(line))
        return line[:at] + bytes([line[at] ^ (1 << draw.randrange(8))]) + line[at + 1 :]
    if kind == 1:
        return line[:at]
    if kind == 2:
        return line[:at] + line[end:]
    if kind == 3:  # twice
        return line[:end] + line[at:]
    if kind == 4:
        return line[:at] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 4))) + line[at:]
    if kind == 5 and others:  # the head of one, the tail of another
        other = draw.choice(others)
        return line[:at] + other[draw.randint(0, len(other)) :]
    if kind == 6 and large and draw.randrange(60) == 0:
        return line[:at] + draw.choice(LARGE) + line[end:]
    if kind == 7:  # in place of a value
        marks = [i for i, byte in enumerate(line) if byte in b'",:\t[]{}= ']
        if len(marks) > 1:
            first = draw.randrange(len(marks) - 1)
            return line[: marks[first] + 1] + draw.choice(TOKENS) + line[marks[first + 1] :]
    return line[:at] + draw.choice(TOKENS) + line[at:]
