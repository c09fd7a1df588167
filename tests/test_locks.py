"""A folder has one writer, and processes end with the one that started them."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from ended import gone

from elastic_lightning import locks
from elastic_lightning.errors import UserError
from elastic_lightning.locks import LOCK, locked, wait_until_free

HOLD = """
import os, sys, time
from pathlib import Path
from elastic_lightning.locks import locked
with locked(Path(sys.argv[1]), "a test"):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
from elastic_lightning.processes import child_environment
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, **child_environment()})
print(child.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""
CHILD = "from elastic_lightning import processes\n{}processes.end_with_parent()\nimport time\ntime.sleep(60)\n"


@pytest.mark.parametrize("forks", [False, True])
def test_a_folder_has_one_writer_until_that_process_ends_however_it_does(forks, tmp_path):
    """Not until the workers end that were forked from it."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), *(["forks"] if forks else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        assert holder.stdout.readline() == b"held\n"
        for attempt in (lambda: locked(tmp_path, "me").__enter__(), lambda: wait_until_free(tmp_path, 0.2)):
            said = rf"process {holder.pid} on .*\(a test, since .*\) writes to {tmp_path}"
            with pytest.raises(UserError, match=said):
                attempt()
        holder.kill()
        holder.wait()
        with locked(tmp_path, "me"):
            assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()
        if forks:
            os.killpg(holder.pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_leaves_nothing_and_takes_nothing_away(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder, "me"):
        assert folder.is_dir()
    assert not (tmp_path / "a").exists()
    with locked(folder, "me"):
        (folder / "kept").touch()
        with pytest.raises(UserError, match=f"process {os.getpid()} "), locked(folder, "me too"):
            pytest.fail("it is held")
    assert [path.name for path in folder.iterdir()] == ["kept"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / LOCK).symlink_to(folder / "kept")
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "linked", "me"):
        pytest.fail("a link is not followed")
    assert (folder / "kept").read_text() == ""


def test_where_there_are_no_locks_work_goes_on(tmp_path, monkeypatch, capsys):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locked(tmp_path, "me"), locked(tmp_path, "me too"):
        (tmp_path / "made").touch()
    assert "no locks (No locks available): nobody is kept" in capsys.readouterr().out
    monkeypatch.setattr(locks, "fcntl", None)  # as on Windows
    with locked(tmp_path, "me"), locked(tmp_path, "me too"):
        wait_until_free(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("without", ["", "processes._killed_by_kernel = lambda: False\n"], ids=["prctl", "no prctl"])
@pytest.mark.parametrize("late", [False, True])
def test_a_child_ends_with_its_parent(without, late, tmp_path):
    """Also where that is gone before the child looks."""
    child = f"import time\ntime.sleep({0.5 if late else 0})\n{CHILD.format(without)}"
    command = [sys.executable, "-c", PARENT, child, "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        if not late:
            assert not gone(pid, 0.5)
        parent.kill()
        parent.wait()
        assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_with_another_one_in_between_stays():
    """`sh -c` and the like: who asked is not who started it, and lives."""
    script = CHILD.format("").replace("time.sleep(60)", "print('stays')")
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "$SCRIPT"; true'],
        env={**os.environ, "SCRIPT": script, "ELASTIC_LIGHTNING_PARENT": str(os.getpid())},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "stays\n"
