"""Hostile messages: legal ones with something changed that a parser may trip over. The seed decides all of it."""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

HOSTILE_TEXT = (
    "",
    "\x00",
    "\r\nX: y",
    "\x1b]0;owned\x07\x1b[2J",
    "[/x]",
    "[bold",
    "\u202e\u2066",
    "\ud800",
    "../../../v1/devices?x=",
    "%00%2e%2e/",
    "a" * 70_000,
    "\U0001f4a5" * 300,
    "NaN",
    "1e999",
    "${jndi:x}",
    "'; DROP TABLE devices; --",
)
HOSTILE_NUMBERS = (
    "0",
    "-1",
    "-0.0",
    "1e-320",
    "2e30",
    "1e308",
    "-1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "9007199254740993",
    "9223372036854775808",
    "-9223372036854775809",
    "1" * 400,
    "1" * 5000,
    "0." + "3" * 3000,
    "01",
    "1.0",
    "true",
)
_MOST_DEPTH = 3000


class Raw(str):
    """A piece of JSON text that stands for itself, whether it is legal or not."""


def mutated(random: Random, message: Any) -> bytes:
    """The message as JSON with one to three changes, and sometimes with bytes that are no JSON any more."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        message = _changed(random, message)
    data = _write(message).encode("utf-8", "surrogatepass")
    return damaged(random, data) if random.random() < 0.25 else data


def damaged(random: Random, data: bytes) -> bytes:
    """The bytes with one flipped, cut off, put in, doubled, or with something behind them."""
    at = random.randrange(len(data) + 1)
    kind = random.randrange(6)
    if kind == 0 and data:
        at %= len(data)
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + random.randbytes(random.randrange(1, 40)) + data[at:]
    if kind == 3:
        return data + data
    if kind == 4:
        return data[:at] + b"[" * random.choice((100, _MOST_DEPTH)) + data[at:]
    return data + b"\x00" * random.randrange(1, 100)


def hostile_value(random: Random) -> Any:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: Raw(random.choice(HOSTILE_NUMBERS)),
        lambda: random.choice(HOSTILE_TEXT),
        lambda: None,
        lambda: {},
        lambda: [],
        lambda: {random.choice(HOSTILE_TEXT): random.choice(HOSTILE_TEXT)},
        lambda: [Raw(random.choice(HOSTILE_NUMBERS))] * random.choice((1, 2000)),
        lambda: Raw("[" * _MOST_DEPTH + "]" * _MOST_DEPTH),
        lambda: Raw('{"a":' * _MOST_DEPTH + "1" + "}" * _MOST_DEPTH),
        lambda: {f"k{index}": index for index in range(random.choice((3, 3000)))},
    )
    return random.choice(makers)()


def _changed(random: Random, message: Any) -> Any:
    """A copy of the value with one change anywhere in it."""
    places = list(_places(message))
    if not places or isinstance(message, Raw):
        return hostile_value(random)
    path = random.choice(places)
    return _at(message, path, random)


def _at(value: Any, path: tuple[Any, ...], random: Random) -> Any:
    if path:
        key, rest = path[0], path[1:]
        if isinstance(value, dict):
            if not rest and random.random() < 0.2:
                return {name: inner for name, inner in value.items() if name != key}
            if not rest and random.random() < 0.1:
                return {**value, random.choice(HOSTILE_TEXT) or "x": value[key]}
            return {name: _at(inner, rest, random) if name == key else inner for name, inner in value.items()}
        if not rest and random.random() < 0.1:
            return [*value, *value]
        return [_at(inner, rest, random) if index == key else inner for index, inner in enumerate(value)]
    return hostile_value(random)


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Where something can be changed: the path of every key and item, at any depth."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (key,)
        for path in _places(inner):
            yield (key, *path)


def _write(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_write(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_write, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
