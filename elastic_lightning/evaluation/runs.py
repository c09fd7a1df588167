"""Finished runs read back from their TensorBoard event files, on the `ppo_step` axis."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from elastic_lightning.errors import UserError
from elastic_lightning.outputs import is_aside

REWARD, DRIFT = "val/reward", "val/kl"
LOST = "lost:"  # before the tag of something good: the drift is how much of it is lost since the start


class Run(NamedTuple):
    """One training run: `metrics` maps a name to {ppo_step: value}; `resets` are the ppo_steps of its resets."""

    method: str
    seed: int
    folder: Path
    metrics: dict[str, dict[int, float]]
    resets: list[int]


def short(tag: str) -> str:
    """The column of a TensorBoard tag: `val/kl` is `kl`, `lost:val/bleu` is `bleu_lost`, other tags keep their name."""
    if tag.startswith(LOST):
        return f"{short(tag.removeprefix(LOST))}_lost"
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
    good = scalars.get(drift.removeprefix(LOST)) if drift.startswith(LOST) else None
    if good:
        scalars[drift] = {step: good[min(good)] - value for step, value in good.items()}
    if reward not in scalars or drift not in scalars:
        return None
    metrics = {short(tag): scalars[tag] for tag in scalars if tag.startswith("val/") or tag in (reward, drift)}
    name = re.fullmatch(r"seed_(\d+)", folder.name)
    method, seed = (folder.parent.name, int(name[1])) if name else (folder.name, 0)
    counts = [scalars[tag] for tag in scalars if re.fullmatch(r"reset(\[.*\])?/count", tag)]  # one a callback
    return Run(method, seed, folder, metrics, sorted({step for count in counts for step in reset_steps(count)}))


def event_folders(folders: list[Path]) -> list[Path]:
    """Every folder with event files under the given ones, each once, in the order given; but what was moved aside.

    Raises:
        UserError: a folder does not exist, or what is named like an event file is none.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report: no such folder: {folder}")
    found = [path for folder in folders for path in files_under(folder, "events.out.tfevents*")]
    return list(dict.fromkeys(path.parent for path in found))


def files_under(folder: Path, pattern: str) -> list[Path]:
    """Files of these names below a folder, but for what was moved aside there.

    Raises:
        UserError: one is not a file: of a pipe, say, reading never ends.
    """
    top = folder.resolve()
    found = [path for path in sorted(top.rglob(pattern)) if not is_aside(path.relative_to(top))]
    wrong = next((path for path in found if not path.is_file()), None)
    if wrong is not None:
        raise UserError(f"report: {wrong} is not a file: remove it")
    return found


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
