"""`elastic-lightning report RUN...`: what each method paid in drift for its reward, as table and picture.

A run is a folder with TensorBoard event files; its scalars lie on the `ppo_step` axis. Runs that differ in the seed
alone (`<method>/seed_<N>`) are one method: its mean path is the mean over seeds at the steps every seed has.
"""

import argparse
import csv
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from elastic_lightning.errors import UserError

REWARD, DRIFT = "val/reward", "val/kl"
STANDARD = ("perplexity", "sample_perplexity", "distinct_1", "distinct_2", "distinct_3", "entropy", "length")
LABELS = {
    "kl": "KL to the initial policy (nats per sequence)",
    "reward": "mean reward",
    "perplexity": "perplexity on human text",
    "toy_accept": "share of samples the grammar accepts",
}
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito, for every eye


class Run(NamedTuple):
    """One training run: `metrics` maps a name to {ppo_step: value}; `resets` are the ppo_steps of its resets."""

    method: str
    seed: int
    folder: Path
    metrics: dict[str, dict[int, float]]
    resets: list[int]


class Method(NamedTuple):
    """The seeds of a method on their common steps: `steps` [N], `reward` and `drift` [seeds, N]."""

    name: str
    runs: list[Run]
    steps: np.ndarray
    reward: np.ndarray
    drift: np.ndarray


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, NaN where it is not known."""

    mean: float
    error: float = math.nan

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "-"
        digits = 1 if abs(self.mean) >= 10 else 2 if abs(self.mean) >= 1 else 3
        error = f" ± {self.error:.{digits}f}" if math.isfinite(self.error) else ""
        return f"{self.mean:.{digits}f}{error}"


# ---- reading -------------------------------------------------------------------------------------------------------


def short(tag: str) -> str:
    """The column of a TensorBoard tag: `val/kl` is `kl`, other tags keep their name."""
    return tag.removeprefix("val/")


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of the event files right in `folder`; of a step written twice, the last written counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # A resumed run goes back a few steps; TensorBoard would purge, we overwrite step by step.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    by_time = {tag: sorted(events.Scalars(tag), key=lambda event: event.wall_time) for tag in events.Tags()["scalars"]}
    return {tag: {event.step: event.value for event in items} for tag, items in by_time.items()}


def reset_steps(counts: dict[int, float]) -> list[int]:
    """The steps at which the number of resets went up."""
    steps = sorted(counts)
    before = dict(zip(steps[1:], steps, strict=False))
    return [step for step in steps if counts[step] > (counts[before[step]] if step in before else 0)]


def read_run(folder: Path, reward: str, drift: str) -> Run | None:
    """The run in `folder`, or None if it did not log both tags."""
    scalars = read_scalars(folder)
    if reward not in scalars or drift not in scalars:
        return None
    metrics = {short(tag): scalars[tag] for tag in scalars if tag.startswith("val/") or tag in (reward, drift)}
    name = re.fullmatch(r"seed_(\d+)", folder.name)
    method, seed = (folder.parent.name, int(name[1])) if name else (folder.name, 0)
    return Run(method, seed, folder, metrics, reset_steps(scalars.get("reset/count", {})))


def event_folders(folders: list[Path]) -> list[Path]:
    """Every folder with event files under the given ones, each once, in the order given.

    Raises:
        UserError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report: no such folder: {folder}")
    found = [path.parent for folder in folders for path in sorted(folder.resolve().rglob("events.out.tfevents*"))]
    return list(dict.fromkeys(found))


def collect(folders: list[Path], reward: str = REWARD, drift: str = DRIFT) -> tuple[list[Run], list[Path]]:
    """The runs under `folders` that hold both tags, and the folders left out because they do not."""
    read = {folder: read_run(folder, reward, drift) for folder in event_folders(folders)}
    runs = [run for run in read.values() if run is not None]
    return tell_apart(runs), [folder for folder, run in read.items() if run is None]


def home(run: Run) -> Path:
    """The folder that stands for the run's method: it holds the `seed_<N>` folders, or is the run itself."""
    return run.folder.parent if run.folder.name.startswith("seed_") else run.folder


def common_parent(runs: list[Run]) -> Path:
    """The deepest folder above all methods."""
    return Path(os.path.commonpath([home(run).parent for run in runs]))


def tell_apart(runs: list[Run]) -> list[Run]:
    """Methods of one name in several places (`a/ppo`, `b/ppo`) get their path as name: they are not seeds of one."""
    homes = {method: {home(run) for run in runs if run.method == method} for method in {run.method for run in runs}}

    def name(run: Run) -> str:
        return run.method if len(homes[run.method]) == 1 else home(run).relative_to(common_parent(runs)).as_posix()

    return [run._replace(method=name(run)) for run in runs]


# ---- numbers -------------------------------------------------------------------------------------------------------


def estimate(values: np.ndarray) -> Estimate:
    """Mean and standard error of [seeds] values; one seed has no standard error."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


def errors(values: np.ndarray) -> np.ndarray:
    """Standard error over seeds at each step: [seeds, N] -> [N], zero for one seed."""
    return values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.zeros(values.shape[1])


def common_steps(runs: list[Run], names: list[str]) -> list[int]:
    """The steps at which every run has a finite value of every named metric."""
    finite = [{s for s, v in run.metrics.get(name, {}).items() if math.isfinite(v)} for run in runs for name in names]
    return sorted(set.intersection(*finite))


def on_steps(runs: list[Run], name: str, steps: list[int]) -> np.ndarray:
    """[seeds, N] values of one metric."""
    return np.array([[run.metrics[name][step] for step in steps] for run in runs])


def group(runs: list[Run], reward: str, drift: str) -> list[Method]:
    """The runs by method, in the order met.

    Raises:
        UserError: the seeds of a method have no step in common.
    """
    reward, drift = short(reward), short(drift)
    methods = []
    for name in dict.fromkeys(run.method for run in runs):
        seeds = sorted((run for run in runs if run.method == name), key=lambda run: run.seed)
        steps = common_steps(seeds, [reward, drift])
        if not steps:
            raise UserError(
                f"report: no ppo_step has {reward} and {drift} in every seed of {name!r}: report them apart"
            )
        curves = on_steps(seeds, reward, steps), on_steps(seeds, drift, steps)
        methods.append(Method(name, seeds, np.array(steps), *curves))
    return methods


def moving(methods: list[Method]) -> list[Method]:
    """The methods that left the start: reward rose and drift grew by more than a trace of the largest in the report.

    A frozen policy is not one of them: a level of reward that it reaches too says nothing about the others.
    """
    rise = {m.name: m.reward.mean(0).max() - m.reward.mean(0)[0] for m in methods}
    spread = {m.name: np.ptp(m.drift.mean(0)) for m in methods}
    enough_rise, enough_spread = 0.01 * max(rise.values()), 0.001 * max(spread.values())
    return [m for m in methods if rise[m.name] > max(enough_rise, 0) and spread[m.name] > enough_spread]


def drift_at(level: float, reward: np.ndarray, drift: np.ndarray) -> float:
    """Drift where a path [N] first reaches a reward, linear between checkpoints; NaN if it never does."""
    reached = np.flatnonzero(reward >= level)
    if len(reached) == 0 or not math.isfinite(level):
        return math.nan
    after = reached[0]
    if after == 0:
        return float(drift[0])
    share = (level - reward[after - 1]) / (reward[after] - reward[after - 1])
    return float(drift[after - 1] + share * (drift[after] - drift[after - 1]))


def reward_at(level: float, reward: np.ndarray, drift: np.ndarray) -> float:
    """Best reward of a path [N] while drift <= level, linear between checkpoints; NaN if it is never so low."""
    inside = list(reward[drift <= level])
    for i in range(1, len(drift)):
        if (drift[i - 1] - level) * (drift[i] - level) < 0:
            share = (level - drift[i - 1]) / (drift[i] - drift[i - 1])
            inside.append(reward[i - 1] + share * (reward[i] - reward[i - 1]))
    return float(max(inside, default=math.nan))


def along(function, level: float, method: Method) -> Estimate:
    """`function` at a level on the mean path; its standard error is that of the seeds' own paths, if all have one."""
    seeds = [function(level, *path) for path in zip(method.reward, method.drift, strict=True)]
    error = estimate(np.array(seeds)).error  # NaN as soon as one seed never gets to the level
    return Estimate(function(level, method.reward.mean(0), method.drift.mean(0)), error)


def metric_names(runs: list[Run], reward: str, drift: str) -> list[str]:
    """Reward and drift first, then the usual metrics, then the task's own."""
    found = {name for run in runs for name in run.metrics}
    first = [short(reward), short(drift), *(name for name in STANDARD if name in found)]
    return list(dict.fromkeys([*first, *sorted(found)]))


def final(method: Method, name: str) -> Estimate:
    """A metric at the last common step, or where it was last measured before."""
    measured = [step for step in common_steps(method.runs, [name]) if step <= method.steps[-1]]
    return estimate(on_steps(method.runs, name, measured[-1:])[:, 0]) if measured else Estimate(math.nan)


class Summary(NamedTuple):
    """The two levels at which methods are compared (NaN if no method moved) and one row of estimates a method."""

    reward_level: float
    drift_level: float
    rows: dict[str, dict[str, Estimate]]


def summarize(methods: list[Method], names: list[str]) -> Summary:
    """The numbers of the printed table; `names` are the metrics, reward and drift first."""
    movers = moving(methods)
    reward_level = min((m.reward.mean(0).max() for m in movers), default=math.nan)
    drift_level = min((m.drift.mean(0).max() for m in movers), default=math.nan)
    rows = {}
    for method in methods:
        row = {f"final_{name}": final(method, name) for name in names}
        row[f"best_{names[0]}"] = estimate(method.reward.max(axis=1))
        row[f"{names[1]}_at_equal_{names[0]}"] = along(drift_at, reward_level, method)
        row[f"{names[0]}_at_equal_{names[1]}"] = along(reward_at, drift_level, method)
        rows[method.name] = row
    return Summary(float(reward_level), float(drift_level), rows)


# ---- writing -------------------------------------------------------------------------------------------------------


def write_rows(path: Path, header: list[str], rows: list[list]) -> None:
    """A CSV file; NaN is blank."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([["" if cell != cell else cell for cell in row] for row in rows])


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

    reward, drift = names[:2]
    shown = [name for name in names[2:] if name == "perplexity" or name not in STANDARD]
    heads = {f"final_{reward}": f"final\n{reward}", f"best_{reward}": f"best\n{reward}"}
    heads |= {f"final_{name}": f"final\n{name}" for name in (drift, *shown)}
    heads[f"{drift}_at_equal_{reward}"] = f"{drift} at\n{reward} {Estimate(summary.reward_level)}"
    heads[f"{reward}_at_equal_{drift}"] = f"{reward} at\n{drift} {Estimate(summary.drift_level)}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("method", "seeds", "steps", *heads.values()):
        table.add_column(head, justify="left" if head == "method" else "right", overflow="fold")
    for m in methods:
        counts = [str(len(m.runs)), str(m.steps[-1])]
        table.add_row(m.name, *counts, *(str(summary.rows[m.name][column]) for column in heads))
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
        console.print(line, markup=False, highlight=False, style="dim")


# ---- the picture ---------------------------------------------------------------------------------------------------


def draw(path: Path, methods: list[Method], names: list[str]) -> None:
    """frontier.png: reward over drift on the left; reward, drift and one more metric over ppo_step on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplot_mosaic(
        [["frontier", "reward"], ["frontier", "drift"], ["frontier", "extra"]], width_ratios=(1.7, 1)
    )
    color = {m.name: COLORS[i % len(COLORS)] for i, m in enumerate(methods)}
    extra = next((name for name in ("toy_accept", "perplexity") if name in names[2:]), None)
    for m in methods:
        draw_path(panels["frontier"], m, color[m.name])
        draw_curve(panels["reward"], m, m.steps, m.reward, color[m.name])
        draw_curve(panels["drift"], m, m.steps, m.drift, color[m.name])
        steps = common_steps(m.runs, [extra]) if extra else []
        if steps:
            draw_curve(panels["extra"], m, steps, on_steps(m.runs, extra, steps), color[m.name])
    label_frontier(panels["frontier"], methods, names)
    for key, name in (("reward", names[0]), ("drift", names[1]), ("extra", extra)):
        label_curve(panels[key], name)
    panels["extra" if extra else "drift"].set_xlabel("ppo_step (PPO batches)")
    figure.savefig(path, dpi=150)


def draw_path(axes, method: Method, color: str) -> None:
    """A method's way through the plane: thin lines a seed, a thick mean with error bars, start, end and resets."""
    drift, reward = method.drift.mean(0), method.reward.mean(0)
    if len(method.runs) > 1:
        axes.plot(method.drift.T, method.reward.T, color=color, lw=0.7, alpha=0.35)
    axes.plot(drift, reward, color=color, lw=2.2, label=method.name)
    at = np.unique(np.linspace(0, len(drift) - 1, 9).astype(int))[1:]
    bars = {"xerr": errors(method.drift)[at], "yerr": errors(method.reward)[at]} if len(method.runs) > 1 else {}
    axes.errorbar(drift[at], reward[at], **bars, fmt="o", ms=3.5, color=color, elinewidth=1, capsize=2)
    axes.plot(drift[-1], reward[-1], marker="s", ms=9, color=color, mec="white", zorder=5)
    resets = reset_marks(method)
    at_reset = np.interp(resets, method.steps, drift), np.interp(resets, method.steps, reward)
    axes.plot(*at_reset, ls="", marker="v", ms=11, color=color, mec="black", zorder=6)


def draw_curve(axes, method: Method, steps, values: np.ndarray, color: str) -> None:
    """The mean of [seeds, N] values over steps, its standard error as a band, resets as dotted lines."""
    mean, error = values.mean(0), errors(values)
    axes.plot(steps, mean, color=color, lw=1.6)
    axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2, lw=0)
    for step in reset_marks(method):
        axes.axvline(step, color=color, ls=":", lw=1)


def reset_marks(method: Method) -> list[int]:
    """The steps of the resets of any seed, as far as the mean path goes."""
    return sorted({step for run in method.runs for step in run.resets if step <= method.steps[-1]})


def label_frontier(axes, methods: list[Method], names: list[str]) -> None:
    """Axes, the start, and a legend that says what the markers are."""
    start = np.mean([(m.drift[:, 0].mean(), m.reward[:, 0].mean()) for m in methods], axis=0)
    axes.plot(*start, ls="", marker="o", ms=10, color="white", mec="black", mew=1.6, zorder=7, label="start")
    axes.plot([], [], ls="", marker="s", ms=8, color="grey", label="end")
    if any(reset_marks(m) for m in methods):
        axes.plot([], [], ls="", marker="v", ms=9, color="grey", mec="black", label="reset")
    label = LABELS.get(names[1], names[1])
    reached = [m.drift.mean(0).max() for m in moving(methods)]
    # Drift starts at 0, so not a logarithm; the square root keeps a method at 2 nats in sight of one at 100.
    if reached and max(reached) > 10 * min(reached) > 0:
        axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
        ticks = [0, *(digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5))]
        axes.set_xticks([tick for tick in ticks if max(reached) / 100 < tick < 1.1 * max(reached) or tick == 0])
        axes.xaxis.set_major_formatter("{x:g}")
        label += ", square-root axis"
    axes.set(xlabel=label, ylabel=LABELS.get(names[0], names[0]), title="Reward against drift (up and left is better)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", framealpha=0.9)


def label_curve(axes, name: str | None) -> None:
    """A small panel's axes; a panel without a metric goes."""
    axes.set_visible(name is not None)
    axes.set_title(LABELS.get(name, name), fontsize=10, loc="left") if name else None
    axes.grid(alpha=0.25)


# ---- the command ---------------------------------------------------------------------------------------------------


def make_report(runs: list[Run], left_out: list[Path], output: Path, reward: str, drift: str, console) -> None:
    """Write table.csv, summary.csv and frontier.png into `output` and print the table."""
    methods = group(runs, reward, drift)
    names = metric_names(runs, reward, drift)
    summary = summarize(methods, names)
    output.mkdir(parents=True, exist_ok=True)
    write_table(output / "table.csv", runs, names)
    write_summary(output / "summary.csv", methods, summary)
    draw(output / "frontier.png", methods, names)
    print_report(build_table(methods, summary, names), notes(methods, names, left_out), console)
    console.print(f"Wrote table.csv, summary.csv and frontier.png to {output}", soft_wrap=True, highlight=False)


def main(argv: list[str]) -> int:
    """`elastic-lightning report RUN... [--output DIR] [--reward TAG] [--drift TAG]`.

    Raises:
        UserError: a folder is missing, or no run under the folders holds both tags.
    """
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="elastic-lightning report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one above several")
    parser.add_argument("--output", type=Path, help="default: 'report' beside the runs")
    parser.add_argument("--reward", default=REWARD, metavar="TAG", help="TensorBoard tag of the reward (%(default)s)")
    parser.add_argument("--drift", default=DRIFT, metavar="TAG", help="TensorBoard tag of the drift (%(default)s)")
    given = parser.parse_args(argv)
    runs, left_out = collect(given.runs, given.reward, given.drift)
    if not runs:
        where = ", ".join(map(str, given.runs))
        raise UserError(
            f"report: no run with the tags {given.reward!r} and {given.drift!r} under {where}: see --reward"
        )
    output = given.output or common_parent(runs) / "report"
    make_report(runs, left_out, output, given.reward, given.drift, Console())
    return 0
