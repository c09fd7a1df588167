"""Whether a process has ended."""

import time
from pathlib import Path


def gone(pid, patience=3.0):
    """Does the process end (or wait as a zombie for its reaper) within so many seconds?"""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False
