"""The parser of our own commands: a mistake is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from elastic_lightning.errors import UsageError


class Formatter(argparse.HelpFormatter):
    """argparse's, which says the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_one = isinstance(action.default, str | float | int) and action.default not in ("", argparse.SUPPRESS)
        switch = isinstance(action.default, bool)
        told = "%(default)" in (action.help or "")
        return f"{action.help} (default: %(default)s)" if has_one and not switch and not told else action.help


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviated flags; what it cannot parse raises a `UsageError`."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"elastic-lightning {command}", description=description, allow_abbrev=False, formatter_class=Formatter
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help shows what there is)")
