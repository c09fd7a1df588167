"""Runs that are stopped, resumed, or refused to resume, as a user of the command line sees it."""

import os
import shlex
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_lightning.algorithms import PPO
from elastic_lightning.cli import _chain, main
from elastic_lightning.resume import differences, resume_line


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def callbacks(every):
    return (
        "--trainer.callbacks=[{class_path: ElasticReset, init_args: {every: 3}}, {class_path: SampleLogger}, "
        f"{{class_path: SavePretrained}}, {{class_path: BatchCheckpoint, init_args: {{every: {every}}}}}]"
    )


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def at_batch(monkeypatch):
    """Have something happen inside the update of a PPO batch, by its number from 1."""

    def install(number, action):
        update = PPO.update

        def acting(self, batch):
            if self.ppo_step == number - 1:
                action()
            return update(self, batch)

        monkeypatch.setattr(PPO, "update", acting)
        return lambda: monkeypatch.setattr(PPO, "update", update)

    return install


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_stops_and_the_printed_line_resumes(name, toy_fit, tmp_path, at_batch, capsys):
    handler = signal.getsignal(getattr(signal, name))
    # The configuration names no checkpoint callback at all.
    arguments = [*toy_fit(version="stopped"), "--trainer.max_epochs=1"]
    calm = at_batch(2, lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert main(arguments) == 0
    calm()
    assert signal.getsignal(getattr(signal, name)) is handler
    printed = capsys.readouterr().out
    run = tmp_path / "run" / "stopped"
    assert f"stopped by {name} after batch 2, saved as {run}/checkpoints/batch_000002.ckpt" in printed
    assert checkpoints(run) == ["batch_000002.ckpt"] and not (run / "final").exists()

    (line,) = [line for line in printed.splitlines() if line.startswith("resume with: ")]
    command = shlex.split(line.removeprefix("resume with: "))
    assert command == ["elastic-lightning", *arguments, "--ckpt_path=last"]
    assert main(command[1:]) == 0
    assert main([*toy_fit(version="whole"), "--trainer.max_epochs=1"]) == 0
    whole = tmp_path / "run" / "whole"
    assert scalars(run) == scalars(whole)
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    ours, theirs = load_file(run / "final" / "model.safetensors"), load_file(whole / "final" / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_last_without_a_checkpoint_is_an_error(toy_fit, tmp_path, capsys):
    for command in ("fit", "validate", "test", "predict"):
        assert main([*toy_fit(command=command, version="new"), "--ckpt_path=last"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: --ckpt_path last: no checkpoint in {tmp_path}/run/new/checkpoints")
    assert not (tmp_path / "run" / "new" / "final").exists()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where a finished run is kept for the tests of this file."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def finished(toy_fit, tmp_path, kept):
    """A run of four batches with the checkpoints of the last two; made once, and copied."""
    run = tmp_path / "run" / "seed_1"
    if kept.exists():
        shutil.copytree(kept, run)
    else:
        assert main([*toy_fit(), callbacks(1)]) == 0
        shutil.copytree(run, kept)
    return run


def test_a_run_without_a_folder_of_its_own_does_not_resume(finished, toy_fit, capsys):
    path = finished / "checkpoints" / "batch_000003.ckpt"
    for flag in ("--trainer.logger=true", "--trainer.logger.init_args.version=null"):
        assert main([*toy_fit(), flag, f"--ckpt_path={path}"]) == 1
        assert "--trainer.logger.init_args.version=seed_1" in capsys.readouterr().err
    assert not list(finished.parent.rglob("version_*"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("--seed_everything=2", "seed_everything was 1 and is 2"),
        ("--model.init_args.ppo.learning_rate=0.5", "model.init_args.ppo.learning_rate was 0.00015 and is 0.5"),
        ("--data.init_args.batch_size=4", "data.init_args.batch_size was 8 and is 4"),
    ],
)
def test_a_checkpoint_of_another_run_says_what_differs(changed, said, finished, toy_fit, capsys):
    before = scalars(finished)
    assert main([*toy_fit(), callbacks(1), changed, "--ckpt_path=last"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and error.count(" and is ") == 1
    assert scalars(finished) == before and checkpoints(finished) == ["batch_000003.ckpt", "batch_000004.ckpt"]


def test_what_else_changed_is_printed(finished, toy_fit, capsys):
    assert main([*toy_fit(), callbacks(2), "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    printed = capsys.readouterr().out
    assert "note: trainer.max_epochs is 2 here, and was 1" in printed
    assert "note: trainer.callbacks.BatchCheckpoint.init_args.every is 2 here, and was 1" in printed
    assert [step for step, _ in scalars(finished)["train/reward"]] == [*range(1, 9)]


@pytest.mark.parametrize(("part", "folder"), [("reward", "reward"), ("initial", "policy")])
def test_frozen_weights_that_changed_are_refused(part, folder, finished, toy_fit, toy, tmp_path, capsys):
    shutil.copytree(toy / folder, tmp_path / "copy")
    flag = f"--model.init_args.{'reward.init_args.path' if folder == 'reward' else 'policy.path'}={tmp_path}/copy"
    path = finished / "checkpoints" / "batch_000003.ckpt"
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    assert main([*toy_fit(), callbacks(1), flag, f"--ckpt_path={path}"]) == 0  # moved, and the same

    name = max(weights, key=lambda name: weights[name].numel())
    weights[name] = weights[name].flip(0)  # the same numbers in another order
    save_file(weights, file, metadata={"format": "pt"})
    assert main([*toy_fit(), callbacks(1), flag, f"--ckpt_path={path}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the weights of {part} are not those that the checkpoint was trained with" in error


def test_a_full_disk_leaves_the_last_checkpoint_whole(toy_fit, tmp_path, at_batch, capsys):
    run = tmp_path / "run" / "seed_1"
    file = run / "checkpoints" / "batch_000003.writing.writing"
    calm = at_batch(3, lambda: file.symlink_to("/dev/full"))
    assert main([*toy_fit(), callbacks(1)]) == 1
    calm()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "batch_000003.ckpt: No space left on device; the last good checkpoint is" in error
    assert checkpoints(run) == ["batch_000001.ckpt", "batch_000002.ckpt"]
    assert torch.load(run / "checkpoints" / "batch_000002.ckpt", weights_only=True)["ppo_step"] == 2
    assert main([*toy_fit(), callbacks(1), "--ckpt_path=last"]) == 0
    assert [step for step, _ in scalars(run)["train/reward"]] == [1, 2, 3, 4]


def test_a_folder_that_vanishes_is_named(toy_fit, tmp_path, at_batch, capsys):
    run = tmp_path / "run" / "seed_1"
    at_batch(3, lambda: shutil.rmtree(run))
    assert main([*toy_fit(), callbacks(1)]) == 1
    assert f"the run's folder is gone: {run}/checkpoints" in capsys.readouterr().err.splitlines()[-1]


def test_differences_name_settings_as_the_command_line_does():
    saved = {"model": {"lr": 0.1, "sizes": [1, 2]}, "callbacks": [{"class_path": "a.B", "init_args": {"n": 1}}]}
    given = {"model": {"lr": 0.2, "sizes": (1, 2), "new": 1}, "callbacks": [{"class_path": "B", "init_args": {"n": 2}}]}
    assert differences(saved, given) == {
        "callbacks.B.class_path": ("a.B", "B"),
        "callbacks.B.init_args.n": (1, 2),
        "model.lr": (0.1, 0.2),
    }


def test_the_line_to_resume_replaces_the_checkpoint():
    assert resume_line(["fit", "--ckpt_path", "a", "--x=b c"]) == "elastic-lightning fit '--x=b c' --ckpt_path=last"
    assert resume_line(["fit", "--ckpt_path=a"]) == "elastic-lightning fit --ckpt_path=last"


def test_errors_that_lead_to_one_another_are_read_once():
    first, second = ValueError("first"), OSError("second")
    first.__cause__, second.__context__ = second, first
    assert _chain(first) == [first, second]
