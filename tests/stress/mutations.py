"""Seeded damage to bytes and to nested plain data."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

LARGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return the bytes with one to three random changes, at least one of which acts."""
    changed = content
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = rng.choice(_DAMAGES)(rng, changed)
    return changed if changed != content else _flip(rng, content)


def _flip(rng: random.Random, content: bytes) -> bytes:
    if not content:
        return b"\0"
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _delete(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.randint(1, 64) :]


def _insert(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.randint(1, 64)) + content[start:]


def _repeat(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    piece = content[start : start + rng.randint(1, 256)]
    return content[:start] + piece + content[start:]


def _overwrite(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content) + 1)
    length = rng.randint(1, 256)
    filler = bytes([rng.choice((0, 0xFF, 0x41))]) * length
    return content[:start] + filler[: len(content) - start] + content[start + length :]


def _claim(rng: random.Random, content: bytes) -> bytes:
    """A large number somewhere, near the beginning or the end where headers are."""
    width, code = rng.choice(((2, "H"), (4, "I"), (8, "Q")))
    if len(content) < width:
        return content
    span = len(content) - width + 1
    place = rng.choice((rng.randrange(span), rng.randrange(min(span, 200)), span - 1 - rng.randrange(min(span, 200))))
    number = rng.choice(LARGE) & (2 ** (8 * width) - 1)
    return content[:place] + struct.pack(rng.choice("<>") + code, number) + content[place + width :]


_DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _truncate,
    _delete,
    _insert,
    _repeat,
    _overwrite,
    _claim,
)


def junk(rng: random.Random) -> Any:
    """Return a value that is rarely expected."""
    deep: Any = 0
    for _ in range(rng.choice((3, 30, 300))):
        deep = rng.choice(([deep], {"a": deep}))
    return rng.choice(
        (
            None,
            True,
            False,
            0,
            -1,
            1,
            2**31,
            2**63,
            2**70,
            10**18,
            0.5,
            -0.0,
            1e308,
            float("inf"),
            float("-inf"),
            float("nan"),
            "",
            "x",
            "x" * 5000,
            "ü\n\t\0",
            "../../etc/passwd",
            "/dev/zero",
            "none",
            "1e400",
            [],
            {},
            [None],
            [1, 2, 3],
            ["a", "b"],
            {"a": 1},
            {"name": "x"},
            [-1],
            [10**9, 10**9],
            deep,
        )
    )


def misshapen(rng: random.Random, content: Any, make: Callable[[random.Random], Any] = junk) -> Any:
    """Return a copy of nested data with one to three values replaced, left out, moved or added."""
    changed = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return make(rng)
        container, key = rng.choice(places)
        action = rng.randrange(6)
        if action == 0:
            del container[key]
        elif action == 1:
            other, other_key = rng.choice(places)
            container[key] = copy.deepcopy(other[other_key])
        elif action == 2 and isinstance(container, dict):
            container[rng.choice(("extra", "name", 1, "", "a.b", None))] = make(rng)
        elif action == 2:
            container.insert(key, make(rng))
        else:
            container[key] = make(rng)
    return changed


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])
