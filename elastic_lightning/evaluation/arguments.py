"""The parser of our own commands: a mistake is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from elastic_lightning.errors import UsageError


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviated flags; what it cannot parse raises a `UsageError`."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"elastic-lightning {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help shows what there is)")
