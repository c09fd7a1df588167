"""Worker processes that take turns: each runs one PPO batch when told to, and is idle while another runs.

A worker writes a JSON object a line to the file descriptor it is given; its own output goes to a log. It imports
nothing but the standard library from here, so that a peer's virtual environment can run it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_parent() -> None:
    """In a child before its program begins: however the parent ends, the kernel ends the child too, though it be in the
    midst of an hour's batch. Linux alone has this; elsewhere a worker ends at its next turn."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Turns:
    """A worker's side: `wait` for a turn, `report` what it took."""

    def __init__(self) -> None:
        self.channel = os.fdopen(int(os.environ["LOCKSTEP_CHANNEL"]), "w")

    def wait(self) -> None:
        """Return when it is this worker's turn; leave when there is none any more."""
        if sys.stdin.readline().strip() != "go":
            self.channel.close()
            os._exit(0)  # in the midst of a training loop: there is nothing to save

    def report(self, **values: Any) -> None:
        """Send one line to the driver."""
        self.channel.write(json.dumps(values) + "\n")
        self.channel.flush()


class Worker:
    """The driver's side of one process.

    Args:
        name: of the worker, in messages.
        python: the interpreter that runs it.
        script: a file beside this one.
        options: sent as one JSON argument.
        path: folders in front of its PYTHONPATH.
        wait: till it is set up; else `receive` is to be called before the first batch, and several start at once.
    """

    def __init__(
        self, name: str, python: str, script: str, options: dict[str, Any], path: str = "", wait: bool = True
    ) -> None:
        self.name = name
        python_path = os.pathsep.join(part for part in (path, os.environ.get("PYTHONPATH", "")) if part)
        reading, writing = os.pipe()
        self.log = tempfile.NamedTemporaryFile("w+", prefix=f"{Path(script).name}-", suffix=".log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            env={
                **os.environ,
                "LOCKSTEP_CHANNEL": str(writing),
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": python_path,
            },
            text=True,
            preexec_fn=end_with_parent,
        )
        os.close(writing)
        self.channel = os.fdopen(reading)
        if wait:
            self.receive()

    def receive(self) -> dict[str, Any]:
        """What it reports next, at first that it is set up."""
        line = self.channel.readline()
        if not line:
            sys.exit(f"{self.name} stopped; its log: {self.log.name}\n{Path(self.log.name).read_text()[-2000:]}")
        return json.loads(line)

    def batch(self) -> dict[str, Any]:
        """Have it run one batch; what it reports."""
        print("go", file=self.process.stdin, flush=True)
        return self.receive()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        os.unlink(self.log.name)
