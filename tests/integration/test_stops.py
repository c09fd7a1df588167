"""Runs that are asked to stop, at once or when their batch is saved, and runs that ended before they saved anything."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from lightning import Trainer

from elastic_lightning.algorithms import PPO
from elastic_lightning.callbacks import Preemption
from elastic_lightning.cli import main
from elastic_lightning.errors import UserError
from elastic_lightning.outputs import check_free, ended_unsaved
from elastic_lightning.resume import checkpoint_for

SOON = {"SIGINT": 130, "SIGTERM": 1, "SIGUSR1": 1}  # exit status where nothing could be saved


def acting(monkeypatch, method, number, action):
    """Have something happen inside the n-th call of a method of PPO."""
    original, calls = getattr(PPO, method), []

    def act(self, *arguments):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(self, *arguments)

    monkeypatch.setattr(PPO, method, act)
    return lambda: monkeypatch.setattr(PPO, method, original)


def send(*names):
    def action():
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))

    return action


def left(run):
    return sorted(path.name for path in run.iterdir())


def test_ctrl_c_saves_and_says_how_to_go_on(toy_fit, tmp_path, monkeypatch, capfd):
    before = signal.getsignal(signal.SIGINT)
    acting(monkeypatch, "recompute", 1, send("SIGINT"))
    assert main(toy_fit()) == 0
    out, err = capfd.readouterr()
    run = tmp_path / "run" / "seed_1"
    assert "once more ends it at once" in err and "Traceback" not in err
    assert f"stopped by SIGINT after batch 1, saved as {run}/checkpoints/batch_000001.ckpt" in out
    (line,) = [line for line in out.splitlines() if line.startswith("resume with: ")]
    assert shlex.split(line)[2:] == ["elastic-lightning", *toy_fit(), "--ckpt_path=last"]
    assert signal.getsignal(signal.SIGINT) is before and ".unsaved" not in left(run)


def test_five_ctrl_c_end_at_once_in_one_line(toy_fit, tmp_path, monkeypatch, capfd):
    acting(monkeypatch, "recompute", 2, send(*["SIGINT"] * 5))
    every = "--trainer.callbacks=[{class_path: BatchCheckpoint, init_args: {every: 1}}]"
    assert main([*toy_fit(), every]) == 130
    error = capfd.readouterr().err
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith("error: stopped by SIGINT at once: what came after batch_000001.ckpt is lost; resume with: ")
    assert [path.name for path in (tmp_path / "run" / "seed_1" / "checkpoints").iterdir()] == ["batch_000001.ckpt"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])  # SIGTERM: see test_resume_commands
def test_a_signal_before_the_first_batch_leaves_nothing(name, toy_fit, tmp_path, monkeypatch, capfd):
    acting(monkeypatch, "validation_step", 1, send(name, name))
    (tmp_path / "run" / "seed_1").mkdir(parents=True)
    (tmp_path / "run" / "seed_1" / "notes.txt").write_text("mine")
    assert main(toy_fit()) == SOON[name]
    error = capfd.readouterr().err
    assert error.splitlines()[-1] == f"error: stopped by {name} before a batch was trained: nothing was saved"
    assert "Traceback" not in error and left(tmp_path / "run" / "seed_1") == ["notes.txt"]


@pytest.mark.parametrize("name", SOON)
def test_signals_are_heard_before_anything_is_imported(name):
    """A process of its own, which sleeps where others import torch: raised in there, an exception may abort it."""
    work = "import os, sys, time; from elastic_lightning import cli; cli._run = lambda *a: os.write(1, b'now\\n') and "
    script = work + "time.sleep(60); sys.argv[1:] = ['fit']; sys.exit(cli.main())"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], **options)
    assert process.stdout.readline() == "now\n"
    for _ in range(5):
        process.send_signal(getattr(signal, name))
        time.sleep(0.02)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (SOON[name], "", f"error: stopped by {name}\n")


@pytest.mark.parametrize("error", [RecursionError, None])
def test_what_an_import_makes_of_a_signal_is_no_way_around_it(error, monkeypatch, capsys):
    """numpy's names are imported when they are asked for: interrupted there, it raised a RecursionError."""

    def importing(command, argv):
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGUSR1)
        if error:
            raise error
        callback.on_train_start(SimpleNamespace(received_sigterm=False, is_global_zero=True), None)
        callback.teardown(None, None, "fit")
        return 0

    callback = Preemption()
    monkeypatch.setattr("elastic_lightning.cli._run", importing)
    status = main(["fit"])
    if error:
        assert (status, capsys.readouterr().err) == (1, "error: stopped by SIGUSR1\n")
    else:
        assert callback.received == signal.SIGUSR1  # and ends at its first batch


def test_a_run_that_died_before_its_first_checkpoint_begins_again(toy_fit, tmp_path, monkeypatch, capsys):
    """A kill leaves no time to clean up, which `os._exit` in a fork stands for."""
    run = tmp_path / "run" / "seed_1"
    child = os.fork()
    if child == 0:
        try:
            acting(monkeypatch, "recompute", 2, lambda: os._exit(9))
            main(toy_fit())
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (run / "notes.txt").write_text("mine")
    dead = [path.name for path in run.glob("events.*")]
    assert dead and ended_unsaved(run)
    assert main([*toy_fit(), "--ckpt_path=last"]) == 0
    out = capsys.readouterr().out
    assert f"no checkpoint in {run} yet: the run begins" in out
    assert f"{run} held a run that ended before its first checkpoint: removed {dead[0]}" in out
    assert left(run / "checkpoints") == ["batch_000004.ckpt"] and (run / "notes.txt").exists()
    assert not ended_unsaved(run)
    with pytest.raises(UserError, match="already holds a run"):
        check_free(run)


@pytest.mark.parametrize("name", ["events.out.tfevents.1", "final", "checkpoints"])
def test_what_is_no_remnant_stays(name, tmp_path):
    """A log without the mark, or an export: of a run without checkpoints, or whose checkpoints were removed."""
    (tmp_path / name).symlink_to("nowhere")
    trainer = Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint_for("fit", "last", trainer, [])
    with pytest.raises(UserError, match=rf"already holds a run \({name}"):
        check_free(tmp_path)


def test_a_checkpoint_of_anybodys_is_something_to_go_on_from(tmp_path):
    (tmp_path / ".unsaved").touch()
    assert ended_unsaved(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch=0.ckpt").touch()
    assert not ended_unsaved(tmp_path)
