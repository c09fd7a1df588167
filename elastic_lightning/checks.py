"""Checks of numbers that several options have in common."""

from __future__ import annotations

from typing import Any

from elastic_lightning.errors import UserError

LARGEST = 2**31 - 1  # of a number of rows, tokens, seconds: none is meant to be more, and C code may hold it
LARGEST_SEED = 2**32 - 1  # as of seed_everything


def check_counts(owner: str, values: dict[str, Any], *names: str, least: int = 1) -> None:
    """Raise a `UserError` where one of the named values is a number below `least`, or beyond any use; None is none.

    Args:
        owner: what the message puts before a name, such as "data's " or "texts.".
        values: name -> value, such as ``vars(self)``.
        names: of those to check.
        least: the smallest that is allowed.
    """
    for name in names:
        value = values[name]
        if value is not None and not least <= value <= LARGEST:
            bound = f"{least} or more" if value < least else f"at most {LARGEST}"
            raise UserError(f"{owner}{name} must be {bound}, got {value}")


def check_seed(name: str, seed: int | None) -> None:
    """Raise a `UserError` for a seed that not every generator takes; None is none."""
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"{name} must be from 0 to {LARGEST_SEED}, got {seed}")


def check_text(name: str, text: str) -> None:
    """Raise a `UserError` for text of a command line that was given in another encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} {text[:50]!a} is not UTF-8: set the terminal's encoding, or use a file") from error
