"""YAML from anywhere, read within bounds: what a few lines can say must not fill the memory or the stack."""

from __future__ import annotations

from typing import Any

import yaml

DEEPEST = 64  # levels; our own configurations have ten
LARGEST = 100_000  # values, those counted anew that an alias repeats
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class BoundsError(yaml.YAMLError):
    """Too deep, too large, or endless."""


def check_bounds(text: str) -> None:
    """Raise a `BoundsError` where YAML is nested too deeply, holds too many values, or refers to itself.

    Loaders follow a document by recursion, and share what an alias repeats, but who walks the result meets it as often
    as it is repeated: nine lines of nine aliases each are 10^9 values. Other mistakes are left to the loader.
    """
    known: dict[str | None, tuple[int, int] | None] = {}  # by anchor: values and levels; None while it is open
    around: list[list[Any]] = [[None, 0, 0]]  # of the collections that are open: anchor, values, levels below
    for event in yaml.parse(text, LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            known[event.anchor] = None
            around.append([event.anchor, 1, 0])
            values, levels = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, below = around.pop()
            values, levels = known[anchor] = values, below + 1
        elif isinstance(event, yaml.ScalarEvent):
            values, levels = known[event.anchor] = 1, 1
        elif isinstance(event, yaml.AliasEvent) and event.anchor in known:
            if known[event.anchor] is None:
                raise BoundsError(f"line {event.start_mark.line + 1}: *{event.anchor} is a part of itself")
            values, levels = known[event.anchor]
        else:
            continue
        around[-1][1] += values
        around[-1][2] = max(around[-1][2], levels)
        if len(around) - 1 + levels > DEEPEST:
            raise BoundsError(f"line {event.start_mark.line + 1}: more than {DEEPEST} levels, one in another")
        if around[-1][1] > LARGEST:
            raise BoundsError(f"line {event.start_mark.line + 1}: more than {LARGEST} values, with what aliases repeat")


def bound_command_lines() -> None:
    """Let jsonargparse read configuration files and values on the command line within these bounds."""
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    if getattr(load, "bounded", False):
        return

    def bounded(stream: str) -> Any:
        check_bounds(stream)
        return load(stream)

    bounded.bounded = True  # type: ignore[attr-defined]
    set_loader("yaml", bounded, exceptions=(yaml.YAMLError,))
