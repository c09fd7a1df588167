"""How a command ends that cannot go on."""

from __future__ import annotations

import subprocess
import time

from elastic_lightning.mistakes import origin


def end_launched(processes: list[subprocess.Popen], patience: float = 5.0) -> None:
    """Kill processes that Lightning launched beside this one and that do not end by themselves within so many seconds:
    without this one they would wait in a collective until that times out."""
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def restoring(error: Exception) -> bool:
    """Whether an error came up while what a checkpoint holds was put in its place, and no code of the user's raised
    it."""
    trace, names = error.__traceback__, []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return any("restore" in name for name in names) and origin(error.__traceback__) is not None
