"""The picture of a comparison: the reward-drift frontier beside the curves over ppo_step."""

import re
from pathlib import Path

import numpy as np

from elastic_lightning.evaluation.comparison import Method, common_steps, errors, moving, on_steps
from elastic_lightning.terminal import plain

LABELS = {
    "kl": "KL to the initial policy (nats per sequence)",
    "bleu_message_lost": "drift: BLEU of the messages lost",
    "bleu_task": "task: BLEU of the chain",
    "reward": "mean reward",
    "perplexity": "perplexity on human text",
    "toy_accept": "share of samples the grammar accepts",
    "toy_english": "share of messages that are English",
}
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito, for every eye


def draw(path: Path, methods: list[Method], names: list[str]) -> None:
    """frontier.png: reward over drift on the left; reward, drift and one more metric over ppo_step on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplot_mosaic(
        [["frontier", "reward"], ["frontier", "drift"], ["frontier", "extra"]], width_ratios=(1.7, 1)
    )
    color = {m.name: COLORS[i % len(COLORS)] for i, m in enumerate(methods)}
    extra = next((name for name in ("toy_accept", "toy_english", "perplexity") if name in names[2:]), None)
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
    axes.plot(drift, reward, color=color, lw=2.2, label=as_label(method.name))
    at = np.unique(np.linspace(0, len(drift) - 1, 9).astype(int))[1:]
    bars = {"xerr": errors(method.drift)[at], "yerr": errors(method.reward)[at]} if len(method.runs) > 1 else {}
    axes.errorbar(drift[at], reward[at], **bars, fmt="o", ms=3.5, color=color, elinewidth=1, capsize=2)
    axes.plot(drift[-1], reward[-1], marker="s", ms=9, color=color, mec="white", zorder=5)
    resets = reset_marks(method)
    at_reset = np.interp(resets, method.steps, drift), np.interp(resets, method.steps, reward)
    axes.plot(*at_reset, ls="", marker="v", ms=11, color=color, mec="black", zorder=6)


def as_label(name: str) -> str:
    """A method or metric in the picture: never a formula of TeX, or "_..." which a legend leaves out."""
    return re.sub(r"^_", " _", plain(LABELS.get(name, name)).replace("$", r"\$"))


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
    label = as_label(names[1])
    reached = [m.drift.mean(0).max() for m in moving(methods)]
    # Drift starts at 0, so not a logarithm; the square root keeps a method at 2 nats in sight of one at 100.
    if reached and max(reached) > 10 * min(reached) > 0:
        axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
        ticks = [0, *(digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5))]
        axes.set_xticks([tick for tick in ticks if max(reached) / 100 < tick < 1.1 * max(reached) or tick == 0])
        axes.xaxis.set_major_formatter("{x:g}")
        label += ", square-root axis"
    axes.set(xlabel=label, ylabel=as_label(names[0]), title="Reward against drift (up and left is better)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", framealpha=0.9)


def label_curve(axes, name: str | None) -> None:
    """A small panel's axes; a panel without a metric goes."""
    axes.set_visible(name is not None)
    axes.set_title(as_label(name), fontsize=10, loc="left") if name else None
    axes.grid(alpha=0.25)
