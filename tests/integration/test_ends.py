"""How the command line ends when it cannot go on."""

import importlib
import subprocess
import sys
import time

import pytest
from safetensors import SafetensorError

from elastic_lightning import cli
from elastic_lightning.endings import end_launched
from elastic_lightning.errors import UserError


def test_launched_processes_do_not_outlive_the_one_that_launched_them():
    scripts = ("import time; time.sleep(60)", "import sys; sys.exit(3)")
    hanging, ending = (subprocess.Popen([sys.executable, "-c", script]) for script in scripts)
    began = time.monotonic()
    end_launched([hanging, ending], patience=2.0)
    assert hanging.returncode == -9 and ending.returncode == 3
    assert 2.0 <= time.monotonic() - began < 30.0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "a.ckpt"), "No space left on device: a.ckpt; free some space"),
        (
            # As safetensors 0.8 says it on a full disk.
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "(os error 28); free some space; a run goes on with --ckpt_path last",
        ),
    ],
)
def test_a_full_disk_is_one_line(monkeypatch, capsys, error, line):
    def run(command, argv):
        raise RuntimeError("cannot save") from error

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["fit"]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


def test_where_an_error_came_from_is_shown_when_asked_for(monkeypatch, capsys):
    def run(command, argv):
        raise UserError("no such thing") from KeyError("deep inside")

    monkeypatch.setattr(cli, "_run", run)
    for asked in (False, True):
        if asked:
            monkeypatch.setenv("ELASTIC_LIGHTNING_TRACEBACK", "1")
        assert cli.main(["fit"]) == 1
        printed = capsys.readouterr().err
        assert ("deep inside" in printed) is asked and printed.splitlines()[-1] == "error: no such thing"


def test_files_that_the_users_own_code_misses_are_shown_whole(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("def run(command, argv):\n    open('/nowhere/at/all')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "_run", importlib.import_module("mine").run)
    with pytest.raises(FileNotFoundError):
        cli.main(["fit"])


def test_a_mistake_of_our_own_is_shown_whole(monkeypatch):
    def run(command, argv):
        raise SafetensorError("Error while deserializing header: HeaderTooLarge")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(SafetensorError):
        cli.main(["fit"])
