"""Lines of JSON between the tests and the program, in which values are plain data and nothing can be hidden."""

from __future__ import annotations

import json
import os
from collections import UserList, deque
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

LONGEST = 4 * 2**20  # bytes of a line


def encode(value: Any) -> Any:
    """JSON of a value: None, bool, int, float, complex, str, bytes, and containers of them.

    Subclasses become what they derive from: what can act, such as a `__eq__` that says yes to everything, stays behind.
    Ranges and deques stay what they are; iterators come out as iterators, and what else can be iterated over as a view,
    of which one can know no more: none of these equals a list or a tuple.

    Raises:
        TypeError: a value of another type.
    """
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, list | UserList):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, frozenset):
        return {"frozenset": [encode(item) for item in value]}
    if isinstance(value, Set):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": list(value)}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Iterable):
        kinds = {"tuple": tuple, "deque": deque, "iterator": Iterator, "view": Iterable}
        kind = next(name for name, kind in kinds.items() if isinstance(value, kind))
        return {kind: [encode(item) for item in value]}
    raise TypeError(f"a {type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    """The value that `encode` was given.

    Raises:
        ValueError, TypeError: not the JSON of a value.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, items)] = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in items}
    if kind == "complex":
        return complex(*items)
    if kind == "bytes":
        return bytes(items)
    if kind == "range":
        return range(*items)
    made = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque, "iterator": iter, "view": _view}[kind]
    return made([decode(item) for item in items])


def _view(items: list[Any]) -> Iterable[Any]:
    """Something with a length and items that equals nothing else."""
    return dict(enumerate(items)).values()


def send(descriptor: int, message: Any) -> None:
    """Write one line."""
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


def receive(descriptor: int) -> Iterator[Any]:
    """What the other side sends, until it closes its end.

    Raises:
        ValueError: a line too long, or not JSON.
    """
    line = bytearray()
    while chunk := os.read(descriptor, 2**16):
        first, *others = chunk.split(b"\n")
        line += first
        for other in others:
            yield json.loads(line)
            line = bytearray(other)
        if len(line) > LONGEST:
            raise ValueError(f"a line of more than {LONGEST} bytes")
