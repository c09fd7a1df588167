"""The alignment tax in words and as a table: what `elastic-lightning evaluate` measured, read back from its files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.comparison import Estimate, estimate
from elastic_lightning.evaluation.runs import files_under
from elastic_lightning.terminal import plain

if TYPE_CHECKING:
    from rich.table import Table

FILE = "evaluation.json"
MODELS = ("final", "best")  # the folders of a run that hold its model


class Evaluated(NamedTuple):
    """What one file says: the model's `method` and seed, from where the file lies, and its numbers by column.

    `home` is the folder of the method's seeds: methods of one name in several places are not one.
    """

    method: str
    seed: int
    home: Path
    numbers: dict[str, float]


def numbers_of(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by the columns of the table; what was not measured is not there."""
    parts = {name: results.get(name) or {} for name in ("perplexity", "humaneval", "reward")}
    found = {"perplexity": parts["perplexity"].get("perplexity")}
    found |= {name: value for name, value in parts["humaneval"].items() if name.startswith("pass@")}
    found |= {"reward": parts["reward"].get("mean"), "length": parts["reward"].get("length")}
    return {name: value for name, value in found.items() if value is not None}


def describe(results: dict[str, Any]) -> list[str]:
    """One line for each part of an evaluation."""
    lines = []
    if "perplexity" in results:
        part = results["perplexity"]
        lines.append(f"perplexity {part['perplexity']:.4g} ({part['tokens']:,} tokens of {part['documents']:,} texts)")
    if "reward" in results:
        part = results["reward"]
        error = "" if part["standard_error"] is None else f" ± {part['standard_error']:.2g}"
        lines.append(f"reward {part['mean']:.4g}{error} ({part['samples']:,} answers)")
    if "humaneval" in results:
        part = results["humaneval"]
        rates = ", ".join(f"{name} {value:.1%}" for name, value in part.items() if name.startswith("pass@"))
        lines.append(f"HumanEval {rates} ({part['problems']} problems, {part['samples']} samples each)")
    return lines


def find(
    folders: Iterable[Path], file: str = FILE, numbers: Callable[[dict], dict[str, float]] = numbers_of
) -> list[Evaluated]:
    """The evaluations under these folders, one a method and seed, in the order of the folders and of their paths.

    Where a stage is named `<method>_evaluation`, `<method>_humaneval` or `<method>_test`, it measured the method.

    Args:
        folders: of runs, or above them.
        file: how a file with an evaluation is named.
        numbers: the columns of what the file holds.

    Raises:
        UserError: a file cannot be read.
    """
    paths = dict.fromkeys(path for folder in folders for path in files_under(Path(folder), file))
    found: dict[tuple[str, int, Path], Evaluated] = {}
    for one in (_read(path, numbers) for path in paths):
        if one is None:
            continue  # of the same name, and not an evaluation of ours
        same = found.get(one[:3], one)  # a model may be measured part by part
        found[one[:3]] = one._replace(numbers=same.numbers | one.numbers)
    return tell_apart(list(found.values()))


def tell_apart(evaluated: list[Evaluated]) -> list[Evaluated]:
    """Methods of one name in several places get their path as name, from where the paths part."""
    homes = {one.home for one in evaluated}
    names = {method: {one.home for one in evaluated if one.method == method} for method in {e[0] for e in evaluated}}
    above = Path(os.path.commonpath([home.parent for home in homes])) if homes else Path()

    def name(one: Evaluated) -> str:
        best = " (best)" if one.method.endswith(" (best)") else ""
        return one.method if len(names[one.method]) == 1 else one.home.relative_to(above).as_posix() + best

    return [one._replace(method=name(one)) for one in evaluated]


def tax_table(evaluated: list[Evaluated]) -> Table:
    """One row a method: means over seeds with their standard errors."""
    return table_of("evaluated", evaluated, _columns(evaluated))


def table_of(title: str, evaluated: list[Evaluated], names: list[str]) -> Table:
    """`title` over the methods, one row each, and their numbers by these names."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in (title, "seeds", *names):
        table.add_column(plain(head), justify="left" if head == title else "right", overflow="fold")
    for method in dict.fromkeys(one.method for one in evaluated):
        seeds = [one for one in evaluated if one.method == method]
        table.add_row(plain(method), str(len(seeds)), *(str(_mean(seeds, name)) for name in names))
    return table


def tax_rows(evaluated: list[Evaluated]) -> tuple[list[str], list[list[Any]]]:
    """Header and one row a file, for a CSV; NaN where a part was not measured."""
    return rows_of(evaluated, _columns(evaluated))


def rows_of(evaluated: list[Evaluated], names: list[str]) -> tuple[list[str], list[list[Any]]]:
    """Header and one row a file; NaN where one has no such number."""
    rows = [[one.method, one.seed, *(one.numbers.get(name, math.nan) for name in names)] for one in evaluated]
    return ["method", "seed", *names], rows


def _read(path: Path, numbers_in: Callable[[dict], dict[str, float]]) -> Evaluated | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = numbers_in(values) if isinstance(values, dict) else {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the evaluation {path}: {error}") from error
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    if not numbers:
        return None
    folder, of_best = path.parent, path.parent.name == "best"
    if folder.name in MODELS:
        folder = folder.parent
    seed = folder.name.removeprefix("seed_")
    home, seed = (folder.parent, int(seed)) if folder.name != seed and seed.isdigit() else (folder, 0)
    method = home.name.removesuffix("_test").removesuffix("_evaluation").removesuffix("_humaneval")
    return Evaluated(f"{method} (best)" if of_best else method, seed, home.with_name(method), numbers)


def _columns(evaluated: list[Evaluated]) -> list[str]:
    """Every column that one of them has, pass@k in the order of k."""
    found = {name for one in evaluated for name in one.numbers}
    rates = sorted((name for name in found if name.startswith("pass@")), key=lambda name: int(name[5:]))
    return [name for name in ("perplexity", *rates, "reward", "length") if name in found]


def _mean(seeds: list[Evaluated], name: str) -> Estimate:
    values = [one.numbers[name] for one in seeds if name in one.numbers]
    return estimate(np.array(values)) if values else Estimate(math.nan)
