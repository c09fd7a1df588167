"""Runs and pipelines killed at random are, once they go on, those that nobody killed."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kill.py"


@pytest.mark.slow
def test_killed_and_resumed_runs_are_the_unbroken_run():
    command = [sys.executable, SCRIPT, "--runs=3", "--pipelines=3", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 of 3 identical" in done.stdout and "3 of 3 pipelines identical" in done.stdout


def test_what_is_not_the_same_is_named(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import torch
    from kill import unlike

    ours = {"a": torch.tensor([1.0, 2.0]), "b": [1, {"c": 0.5}], "d": torch.ones(2), "e": float("nan")}
    assert unlike("x", ours, {**ours, "e": float("nan")}) == []
    assert unlike("x", ours, {**ours, "a": torch.tensor([1.0, 2.0 + 2e-7])}) == ["x.a"]
    assert unlike("x", ours, {**ours, "b": [1, {"c": 0.25}]}) == ["x.b.1.c"]
    assert unlike("x", ours, {**ours, "d": torch.ones(2).double()}) == ["x.d"]
    assert unlike("x", ours, {**ours, "f": 1}) == ["x"]
