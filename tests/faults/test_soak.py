"""The soak, for seconds in place of minutes, and its judgement of runs that grow."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.soak import Sample, judge, measure

SCRIPT = Path(__file__).parent / "soak.py"


def history(resident=lambda t: 500.0, descriptors=lambda t: 9, threads=lambda t: 4):
    return [Sample(float(t), resident(t), descriptors(t), threads(t)) for t in range(0, 600, 3)]


def verdict(**curves):
    return judge(history(**curves), settled=180, tolerance=0.02)


def test_what_stays_is_fine():
    lines, fine = verdict(resident=lambda t: min(500.0, 300 + 2 * t))
    assert fine and "from 186 s to 591 s" in lines[0]
    assert verdict(descriptors=lambda t: 9 + (t % 30 == 0))[1], "a file that is open for a moment is no growth"


@pytest.mark.parametrize(
    ("curves", "word"),
    [
        ({"resident": lambda t: 500 + t / 30}, "memory"),
        ({"resident": lambda t: 500 - t / 30}, "memory"),
        ({"descriptors": lambda t: 9 + t // 300}, "descriptors"),
        ({"threads": lambda t: 4 + t // 300}, "threads"),
    ],
)
def test_what_grows_is_named(curves, word):
    lines, fine = verdict(**curves)
    (grown,) = [line for line in lines if line.startswith("GREW")]
    assert not fine and word in grown


def test_too_short_a_run_is_no_evidence():
    with pytest.raises(SystemExit, match="train for longer"):
        judge(history()[:65], settled=180, tolerance=0.02)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_an_open_file_is_counted(tmp_path):
    before = measure(0.0)
    with (tmp_path / "file").open("w"):
        assert measure(0.0).descriptors == before.descriptors + 1
    assert measure(0.0).descriptors == before.descriptors


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_twenty_seconds_grow_nothing(tmp_path):
    """So short a run still warms up: memory gets a tenth; descriptors and threads have no excuse."""
    command = [sys.executable, str(SCRIPT), "--minutes=0.4", "--settled=14", "--every=0.4", "--tolerance=0.1"]
    command += [f"--csv={tmp_path}/soak.csv", f"--plot={tmp_path}/soak.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "file descriptors" in done.stdout
    with open(tmp_path / "soak.csv", newline="") as file:
        samples = list(csv.DictReader(file))
    assert len(samples) > 20 and float(samples[-1]["seconds"]) > 20 and float(samples[-1]["resident_mib"]) > 100
    assert (tmp_path / "soak.png").stat().st_size > 10_000
