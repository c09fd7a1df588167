"""A pipeline's runs on their way, and how they are shown: a live table on a terminal, plain lines elsewhere."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elastic_lightning.evaluation.stages import Run
from elastic_lightning.terminal import cell, plain

LOG = "log.txt"
HEARTBEAT = 30.0  # seconds between two signs of life where the output is no terminal


@dataclass
class Job:
    """A run on its way: waiting, running, then done, skipped, failed or stopped. Times in seconds."""

    run: Run
    state: str = "waiting"
    process: subprocess.Popen | None = None
    started: float = 0.0
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0

    def end(self, state: str) -> None:
        self.state, self.ended = state, time.monotonic()


def tail(path: Path, lines: int) -> list[str]:
    """The last non-empty lines of a log as a terminal would leave them: no colours, no overwritten progress bars."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        text = file.read().decode("utf-8", errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    shown = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [plain(line.expandtabs()) for line in shown if line][-lines:]


def duration(seconds: float) -> str:
    """`42 s` or `4 min 07 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def last_line(job: Job) -> str:
    """The log's last line while the run is on, the log's path once it is not."""
    path = job.run.folder / LOG
    return "".join(tail(path, 1)) if job.state == "running" else str(path) if job.started else ""


@contextlib.contextmanager
def display(jobs: list[Job], console: Console) -> Iterator[Callable[[], None]]:
    """A live table on a terminal, plain lines elsewhere; yields a function to call after every look at the jobs."""
    if not console.is_terminal:
        yield Lines(jobs, console)
        return
    with Live(get_renderable=lambda: live_table(jobs), console=console, refresh_per_second=2):
        yield lambda: None


def live_table(jobs: list[Job]) -> Table:
    """Stage, seed, state, time and the last line of the log."""
    styles = {"running": "bold cyan", "done": "green", "failed": "bold red", "stopped": "yellow"}
    table = Table("stage", "seed", "state", "time", box=None, pad_edge=False, expand=True)
    table.add_column("log", no_wrap=True, overflow="ellipsis", ratio=1)
    for job in jobs:
        state = Text(job.state, style=styles.get(job.state, "dim"))
        elapsed = duration(job.seconds) if job.started else ""
        table.add_row(job.run.stage, str(job.run.seed), state, elapsed, Text(plain(last_line(job)), style="dim"))
    return table


class Lines:
    """Prints a line when a job changes its state, and a sign of life every `HEARTBEAT` seconds while it runs."""

    def __init__(self, jobs: list[Job], console: Console):
        self.jobs, self.console = jobs, console
        self.said = {job.run.name: ("waiting", 0.0) for job in jobs}

    def __call__(self) -> None:
        now = time.monotonic()
        for job in self.jobs:
            state, when = self.said[job.run.name]
            if job.state != state or (job.state == "running" and now - when >= HEARTBEAT):
                self.said[job.run.name] = (job.state, now)
                elapsed = f" ({duration(job.seconds)})" if job.started and state != "waiting" else ""
                line = f"{job.run.name}: {job.state}{elapsed}  {last_line(job)}".rstrip()
                self.console.print(cell(line), soft_wrap=True)
