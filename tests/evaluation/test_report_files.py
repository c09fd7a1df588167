"""A report takes the place of its own earlier files, and of nobody else's."""

import json
import os
import subprocess
import sys

import pytest
from test_report import path, write_run

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import report

RUNS = "ppo", "kl"


@pytest.fixture
def runs(tmp_path):
    for number, name in enumerate(RUNS):
        write_run(tmp_path / "runs" / name / "seed_1", path([0.5, 0.6 + number / 10], [0, 8]))
    return [tmp_path / "runs" / name for name in RUNS]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A picture takes a second to draw."""
    monkeypatch.setattr(report, "draw", lambda file, methods, names: file.write_text(repr(methods)))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


def make(folders, output, *flags):
    return report.main([*map(str, folders), f"--output={output}", *flags])


def test_a_report_replaces_itself_also_with_more_runs_and_elsewhere(runs, tmp_path, capsys):
    output = tmp_path / "runs" / "report"
    assert make(runs[:1], output) == 0
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = [tmp_path / "moved" / name for name in RUNS]
    before = contents(tmp_path / "moved" / "report")
    assert make(moved, tmp_path / "moved" / "report") == 0
    assert contents(tmp_path / "moved" / "report").keys() == before.keys()
    assert (tmp_path / "moved" / "report" / "table.csv").read_text().count("kl,1,") == 2


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("changed", name) for name in ("table.csv", "summary.csv", "frontier.png")),
        *(
            (kind, name)
            for kind in ("another hand's", "a link", "a dangling link")
            for name in ("table.csv", "test.csv")
        ),
    ],
)
def test_what_a_report_did_not_write_stays(kind, name, runs, tmp_path, capsys):
    output, mine = tmp_path / "out", tmp_path / "mine"
    mine.write_text("mine")
    output.mkdir()
    if kind == "changed":
        make(runs, output)
    (output / name).unlink(missing_ok=True)
    if "link" in kind:
        (output / name).symlink_to(mine if kind == "a link" else tmp_path / "nowhere")
    else:
        (output / name).write_text("mine")
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(UserError, match=rf"{name} is there already.*--force"):
        make(runs, output)
    assert sorted(path.name for path in output.iterdir()) == before
    assert mine.read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert make(runs, output, "--force") == 0
    assert mine.read_text() == "mine" and not (tmp_path / "nowhere").exists()
    assert (output / "table.csv").read_text().startswith("method,") and not (output / "table.csv").is_symlink()


def test_a_report_of_other_runs_stays(runs, tmp_path, capsys):
    output = tmp_path / "out"
    assert make(runs[:1], output) == 0
    before = contents(output)
    with pytest.raises(UserError, match=rf"{output} holds a report of other runs .*ppo.*--force"):
        make(runs[1:], output)
    assert contents(output) == before
    assert make(runs[1:], output, "--force") == 0 and contents(output) != before


def test_a_report_that_was_killed_knows_its_own_again(runs, tmp_path, monkeypatch, capsys):
    """Whatever of its files had taken their places."""
    output, replace = tmp_path / "out", os.replace
    make(runs[:1], output)
    for last in ("frontier.png", "summary.csv", "table.csv"):

        def stop(source, target, last=last):
            if os.path.basename(target) == last:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", stop)
            make(runs, output)
        assert make(runs, output) == 0
        make(runs[:1], output)


def test_what_is_no_file_is_not_read(runs, tmp_path):
    """Reading a pipe would never end."""
    for folder, name in ((runs[0] / "seed_2", "events.out.tfevents.9"), (runs[0] / "seed_1", "evaluation.json")):
        folder.mkdir(exist_ok=True)
        os.mkfifo(folder / name)
        command = [sys.executable, "-m", "elastic_lightning.cli", "report", str(tmp_path / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and f"error: report: {folder / name} is not a file" in done.stderr
        (folder / name).unlink()
    (runs[0] / "seed_1" / "test.json").write_text(json.dumps({"test/kl": 1.0}))
    assert report.main([str(tmp_path / "runs")]) == 0
