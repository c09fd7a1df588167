"""What `elastic-lightning test` measured, read back from its files and put into tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_lightning.evaluation.tax import Evaluated, find, rows_of, table_of

if TYPE_CHECKING:
    from rich.table import Table

FILE = "test.json"


def find_tests(folders: Iterable[Path]) -> list[Evaluated]:
    """The tests under these folders, see `find`.

    Raises:
        UserError: a file cannot be read.
    """
    return find(folders, FILE, lambda values: {name.removeprefix("test/"): value for name, value in values.items()})


def tables(tested: list[Evaluated]) -> list[Table]:
    """One table for each kind of module, which tells by what it measures: means over seeds with standard errors."""
    kinds = dict.fromkeys(tuple(one.numbers) for one in tested)
    return [table_of("tested", [one for one in tested if tuple(one.numbers) == names], list(names)) for names in kinds]


def rows_for_csv(tested: list[Evaluated]) -> tuple[list[str], list[list[Any]]]:
    """Header and one row a file, for a CSV; NaN where a module does not measure that."""
    return rows_of(tested, list(dict.fromkeys(name for one in tested for name in one.numbers)))
