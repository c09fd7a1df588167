"""What the tests of the sandbox need, and leave behind: nothing; and a folder for pipelines."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from pipeline_world import SCRIPT
from trials import processes, wait_until

from elastic_lightning.evaluation import pipeline as pipelines
from elastic_lightning.evaluation import sandbox
from elastic_lightning.evaluation.sandbox import missing_fences

try:
    import fcntl
except ImportError:  # no POSIX, and no sandbox
    fcntl = None


@pytest.fixture(autouse=True)
def one_at_a_time():
    """What is counted here are processes of the machine: the workers of pytest wait for each other."""
    if fcntl is None:
        yield
        return
    with Path(tempfile.gettempdir(), f"elastic-lightning-tests-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """No process and no folder outlives a test."""
    (tmp_path / "folders").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "folders"))
    before = processes()
    yield
    assert wait_until(lambda: processes() <= before), "processes are left"
    assert list((tmp_path / "folders").iterdir()) == []


@pytest.fixture
def fences(request):
    if sys.platform != "linux":
        pytest.skip("the sandbox is one of Linux")
    if "without_namespaces" not in request.fixturenames and missing_fences():
        pytest.skip(missing_fences())


@pytest.fixture
def without_namespaces(monkeypatch):
    """A machine that grants none."""
    monkeypatch.setattr(sandbox, "missing_fences", lambda: "no namespaces here")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE", str(tmp_path / "trace.jsonl"))
    monkeypatch.setattr(pipelines, "PATIENCE", 2.0)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path
