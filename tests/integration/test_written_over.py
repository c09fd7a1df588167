"""What stands in a run's folder: nothing of another run, model or hand is replaced unless that is asked for."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from elastic_lightning.cli import main
from elastic_lightning.locks import LOCK, locked

CALLBACKS = (
    "--trainer.callbacks=[{class_path: ElasticReset, init_args: {every: 3}}, {class_path: SampleLogger}, "
    "{class_path: SavePretrained}, {class_path: BatchCheckpoint, init_args: {every: 1}}]"
)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(folder):
    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/reward")]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where a finished run is kept for the tests of this file."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def finished(toy_fit, tmp_path, kept):
    """A run of four batches with the checkpoints of the last two; made once, and copied."""
    run = tmp_path / "run" / "seed_1"
    if not kept.exists():
        assert main([*toy_fit(), CALLBACKS, "--force"]) == 0
        shutil.copytree(run, kept)
    else:
        shutil.copytree(kept, run)
    return run


@pytest.fixture
def other(finished):
    """Another run of the same settings, with a file that no run made."""
    folder = shutil.copytree(finished, finished.with_name("other"))
    (events,) = folder.glob("events.*")
    events.rename(folder / events.name.replace("tfevents.", "tfevents.9"))
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_run_has_one_writer(finished, toy_fit, tmp_path, capsys):
    before = contents(finished)
    with locked(finished, "another fit"):
        for more in (["--ckpt_path=last"], ["--force"]):
            assert main([*toy_fit(), CALLBACKS, *more]) == 1
            line = capsys.readouterr().err.splitlines()[-1]
            assert line.startswith(f"error: process {os.getpid()} on ") and "another fit" in line
        (finished / LOCK).unlink()
    assert contents(finished) == before
    with locked(tmp_path / "run" / "new", "another fit"):
        assert main(toy_fit(version="new")) == 1
    assert not (tmp_path / "run" / "new").exists()


def test_a_checkpoint_of_another_run_takes_no_run_over(finished, other, toy_fit, capsys):
    checkpoint = f"--ckpt_path={finished}/checkpoints/batch_000003.ckpt"
    arguments, before = [*toy_fit(version="other"), CALLBACKS, checkpoint], contents(other)
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {other} already holds a run (events.out.") and "--force" in line
    assert contents(other) == before
    assert main([*arguments, "--force"]) == 0
    old = other.with_name("other.old-1")
    assert f"note: what was in {other} is in {old} now" in capsys.readouterr().out
    notes = other / "notes.txt"
    assert contents(old) == {name: data for name, data in before.items() if name != notes.relative_to(other)}
    assert notes.read_text() == "mine" and steps(other) == [4] and (other / "final").exists()


def test_a_run_goes_on_from_its_own_checkpoint_wherever_that_lies(finished, toy_fit, tmp_path):
    elsewhere = shutil.copy(finished / "checkpoints" / "batch_000003.ckpt", tmp_path)
    assert main([*toy_fit(), CALLBACKS, f"--ckpt_path={elsewhere}"]) == 0
    assert steps(finished) == [1, 2, 3, 4]
    assert main([*toy_fit(version="new"), CALLBACKS, f"--ckpt_path={elsewhere}"]) == 0  # nothing is there
    assert steps(tmp_path / "run" / "new") == [4]


def test_a_run_that_is_in_the_way_is_moved_aside_if_asked(finished, toy_fit):
    before = contents(finished)
    assert yaml.safe_load((finished / "config.yaml").read_text())["force"] is False  # it was asked for once
    assert main([*toy_fit(), CALLBACKS, "--force", "--trainer.limit_train_batches=2"]) == 0
    assert contents(finished.with_name("seed_1.old-1")) == before and steps(finished) == [1, 2]


@pytest.mark.parametrize(
    ("command", "name", "link"), [("predict", "predictions.jsonl", False), ("test", "test.json", True)]
)
def test_what_was_measured_is_not_written_over(command, name, link, toy_fit, tmp_path, capsys):
    file, mine = tmp_path / "run" / "seed_1" / name, tmp_path / "mine"
    file.parent.mkdir(parents=True)
    mine.write_text("mine")
    file.symlink_to(mine) if link else shutil.copy(mine, file)
    assert main(toy_fit(command=command)) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {file} is there already") and "--force" in line
    assert file.read_text() == "mine" and file.is_symlink() is link
    assert main([*toy_fit(command=command), "--force"]) == 0
    assert file.read_text()[0] == "{" and not file.is_symlink() and mine.read_text() == "mine"
    assert [path.name for path in file.parent.iterdir()] == [name]


def test_what_a_run_made_of_the_end_of_another_one_is_not_cleared(finished, toy_fit, capsys):
    """It trains nothing, and so saves no checkpoint of its own; its `final` is no remains of one that was killed."""
    arguments = [*toy_fit(version="third"), CALLBACKS]
    assert main([*arguments, f"--ckpt_path={finished}/checkpoints/batch_000004.ckpt"]) == 0
    folder = finished.with_name("third")
    before = contents(folder)
    assert Path("final/model.safetensors") in before
    assert main(arguments) == 1
    assert "already holds a run" in capsys.readouterr().err.splitlines()[-1]
    assert contents(folder) == before
