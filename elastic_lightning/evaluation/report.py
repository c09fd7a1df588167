"""`elastic-lightning report RUN...`: what each method paid in drift for its reward, as table and picture.

A run is a folder with TensorBoard event files; its scalars lie on the `ppo_step` axis. Runs that differ in the seed
alone (`<method>/seed_<N>`) are one method: its mean path is the mean over seeds at the steps every seed has.
"""

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.arguments import Parser
from elastic_lightning.evaluation.comparison import (
    STANDARD,
    Estimate,
    Method,
    Summary,
    group,
    metric_names,
    summarize,
)
from elastic_lightning.evaluation.frontier import draw
from elastic_lightning.evaluation.report_files import (
    EVALUATIONS,
    PICTURE,
    SUMMARY,
    TABLE,
    TESTS,
    check_report,
    publishing,
)
from elastic_lightning.evaluation.runs import DRIFT, REWARD, Run, collect, common_parent
from elastic_lightning.evaluation.tax import find, tax_rows, tax_table
from elastic_lightning.evaluation.tested import find_tests, rows_for_csv, tables
from elastic_lightning.outputs import check_writable
from elastic_lightning.terminal import PlainConsole, cell, plain

FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # how one begins, with full-width signs too


def write_rows(path: Path, header: list[str], rows: list[list]) -> None:
    """A CSV file; NaN is blank, and a text that a spreadsheet would take for a formula begins with an apostrophe."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([_no_formula(name) for name in header])
        writer.writerows([["" if value != value else _no_formula(value) for value in row] for row in rows])


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def write_table(path: Path, runs: list[Run], names: list[str]) -> None:
    """Long form: one row a method, seed and ppo_step; blank where a metric was not measured."""
    rows = []
    for run in runs:
        for step in sorted({step for values in run.metrics.values() for step in values}):
            measured = [run.metrics.get(name, {}).get(step, math.nan) for name in names]
            rows.append([run.method, run.seed, step, *(float(f"{value:.7g}") for value in measured)])
    write_rows(path, ["method", "seed", "ppo_step", *names], rows)


def write_summary(path: Path, methods: list[Method], summary: Summary) -> None:
    """One row a method: every final metric, the comparisons and their levels, each with its standard error `_se`."""
    columns = list(summary.rows[methods[0].name])
    header = ["method", "seeds", "ppo_step", *(name + end for name in columns for end in ("", "_se"))]
    rows = []
    for m in methods:
        estimates = [number for column in columns for number in summary.rows[m.name][column]]
        rows.append([m.name, len(m.runs), m.steps[-1], *estimates, summary.reward_level, summary.drift_level])
    write_rows(path, [*header, "equal_reward", "equal_drift"], rows)


def build_table(methods: list[Method], summary: Summary, names: list[str]):
    """The table as rich prints it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    reward, drift = names[:2]
    shown = [name for name in names[2:] if name == "perplexity" or name not in STANDARD]
    heads = {f"final_{reward}": f"final\n{reward}", f"best_{reward}": f"best\n{reward}"}
    heads |= {f"final_{name}": f"final\n{name}" for name in (drift, *shown)}
    heads[f"{drift}_at_equal_{reward}"] = f"{drift} at\n{reward} {Estimate(summary.reward_level)}"
    heads[f"{reward}_at_equal_{drift}"] = f"{reward} at\n{drift} {Estimate(summary.drift_level)}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("method", "seeds", "steps", *heads.values()):
        table.add_column(Text(plain(head, keep="\n")), justify="left" if head == "method" else "right", overflow="fold")
    for m in methods:
        counts = [str(len(m.runs)), str(m.steps[-1])]
        table.add_row(cell(m.name), *counts, *(str(summary.rows[m.name][column]) for column in heads))
    return table


def notes(methods: list[Method], names: list[str], left_out: list[Path]) -> list[str]:
    """What a reader needs to know beside the numbers, one line each."""
    reward, drift = names[:2]
    lines = [
        "Means ± standard error over seeds; a method that never moved sets no level.",
        f"'{drift} at {reward} …': drift where the mean path first gets the highest reward all get (less is better).",
        f"'{reward} at {drift} …': best reward while drift is at most the largest that all come to (more is better).",
    ]
    for m in methods:
        ends = [max(run.metrics[reward]) for run in m.runs]
        if len(set(ends)) > 1:
            lines.append(f"{m.name}: its seeds end at steps {ends}; the means stop at {m.steps[-1]}.")
    if left_out:
        lines.append(f"Left out, as they logged no {reward} or no {drift}: {', '.join(map(str, left_out))}")
    return lines


def print_report(table, lines: list[str], console) -> None:
    """Print; a log file has no width, so there the table takes what it needs and no cell is cut."""
    if not console.is_terminal:
        console.width = max(120, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)
    for line in lines:
        console.print(cell(line), style="dim")


def make_report(
    runs: list[Run],
    left_out: list[Path],
    output: Path,
    reward: str,
    drift: str,
    console,
    folders: Iterable[Path] = (),
    force: bool = False,
) -> None:
    """Write table.csv, summary.csv and frontier.png into `output` and print the table.

    What `test` and `evaluate` measured and left in `folders` is printed and written too: test.csv, evaluation.csv.

    Raises:
        UserError: see `check_report`; nothing is written then.
    """
    places = [run.folder for run in runs]
    check_report(output, places, force)
    methods = group(runs, reward, drift)
    names = metric_names(runs, reward, drift)
    summary = summarize(methods, names)
    folders = list(folders)
    with publishing(output, places) as fresh:
        write_table(fresh / TABLE, runs, names)
        write_summary(fresh / SUMMARY, methods, summary)
        draw(fresh / PICTURE, methods, names)
        written = [TABLE, SUMMARY, PICTURE, *write_measured(fresh, folders)]
    print_report(build_table(methods, summary, names), notes(methods, names, left_out), console)
    print_measured(folders, console)
    console.print(cell(f"Wrote {', '.join(written)} to {output}"), soft_wrap=True)


def write_measured(output: Path, folders: list[Path]) -> list[str]:
    """What `test` and `evaluate` left in these folders, as CSV; the files written."""
    tested, evaluated = find_tests(folders), find(folders)
    written = {TESTS: rows_for_csv(tested)} if tested else {}
    written |= {EVALUATIONS: tax_rows(evaluated)} if evaluated else {}
    for name, (header, rows) in written.items():
        write_rows(output / name, header, rows)
    return list(written)


def print_measured(folders: list[Path], console) -> bool:
    """Print the tables of the same; whether there are any."""
    evaluated = find(folders)
    shown = [*tables(find_tests(folders)), *([tax_table(evaluated)] if evaluated else [])]
    for table in shown:
        print_report(table, [], console)
    return bool(shown)


def main(argv: list[str]) -> int:
    """`elastic-lightning report RUN... [--output DIR] [--reward TAG] [--drift TAG] [--force]`.

    Raises:
        UserError: a folder is missing, no run under the folders holds both tags, or a file would be written over.
    """
    parser = Parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one above several")
    parser.add_argument("--output", type=Path, help="default: 'report' beside the runs")
    parser.add_argument("--reward", default=REWARD, metavar="TAG", help="TensorBoard tag of the reward (%(default)s)")
    parser.add_argument(
        "--drift",
        default=DRIFT,
        metavar="TAG",
        help="TensorBoard tag of the drift (%(default)s); lost:TAG is what is lost of a score",
    )
    parser.add_argument("--force", action="store_true", help="replace files that no report of these runs wrote")
    given = parser.parse_args(argv)
    if given.output is not None:
        check_writable(given.output, "the report")
    runs, left_out = collect(given.runs, given.reward, given.drift)
    if not runs:
        where = ", ".join(map(str, given.runs))
        raise UserError(
            f"report: no run with the tags {given.reward!r} and {given.drift!r} under {where}: see --reward"
        )
    output = given.output or common_parent(runs) / "report"
    make_report(runs, left_out, output, given.reward, given.drift, PlainConsole(), given.runs, given.force)
    return 0
