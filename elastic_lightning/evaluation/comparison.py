"""Methods compared by what each paid in drift for its reward: means over seeds, equal reward, equal drift."""

import math
from typing import NamedTuple

import numpy as np

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.runs import Run, short

STANDARD = ("perplexity", "sample_perplexity", "distinct_1", "distinct_2", "distinct_3", "entropy", "length")


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
