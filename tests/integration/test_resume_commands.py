"""Runs that are stopped, resumed, or refused to resume, as a user of the command line sees it."""

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_lightning.algorithms import PPO
from elastic_lightning.cli import main
from elastic_lightning.errors import UserError
from elastic_lightning.mistakes import _chain
from elastic_lightning.resume import check_same_run, differences, last_checkpoint, resume_line


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
    """Have something happen in the middle of a PPO batch, before its update, by its number from 1."""

    def install(number, action):
        recompute = PPO.recompute

        def acting(self, *inputs):
            if self.ppo_step == number - 1:
                action()
            return recompute(self, *inputs)

        monkeypatch.setattr(PPO, "recompute", acting)
        return lambda: monkeypatch.setattr(PPO, "recompute", recompute)

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


def test_a_signal_before_anything_was_trained_is_told(toy_fit, tmp_path, monkeypatch, capsys):
    measure = PPO.validation_step

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *arguments)

    monkeypatch.setattr(PPO, "validation_step", signalled)
    assert main(toy_fit()) == 1
    assert (
        "stopped by SIGTERM before a batch was trained: nothing was saved" in capsys.readouterr().err.splitlines()[-1]
    )
    assert not (tmp_path / "run").exists()


def test_there_is_no_last_checkpoint_to_measure(toy_fit, tmp_path, capsys):
    for command in ("validate", "test", "predict"):
        assert main([*toy_fit(command=command, version="new"), "--ckpt_path=last"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: --ckpt_path last: no checkpoint in {tmp_path}/run/new/checkpoints")
    assert not (tmp_path / "run" / "new").exists()


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


def test_a_short_run_that_is_over_goes_on_for_longer(toy_fit, tmp_path, capsys):
    """The configuration's checkpoints are 50 batches apart, and the run has four."""
    assert main([*toy_fit(version="longer")]) == 0
    run, whole = tmp_path / "run" / "longer", tmp_path / "run" / "whole"
    assert checkpoints(run) == ["batch_000004.ckpt"]
    assert main([*toy_fit(version="longer"), "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    assert main([*toy_fit(version="whole"), "--trainer.max_epochs=2"]) == 0
    assert checkpoints(run)[-1] == checkpoints(whole)[-1] == "batch_000008.ckpt"
    assert scalars(run) == scalars(whole)
    ours, theirs = load_file(run / "final" / "model.safetensors"), load_file(whole / "final" / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


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


def saved_by(processes, **config):
    return {"config": config, "world_size": processes}


def same_run(checkpoint, processes, **config):
    return check_same_run(checkpoint, config, Path("a.ckpt"), processes)


def test_a_part_that_is_added_or_left_out_is_another_run():
    """Also where one side has nothing: a null, or no such key."""
    alone = {"rewards": {"a": {"class_path": "A"}}}
    both = {"rewards": {"a": {"class_path": "A"}, "b": {"class_path": "B"}}}
    for before, now in ((alone, both), (both, alone)):
        with pytest.raises(UserError, match=r"model.rewards.b.class_path was .* and is"):
            same_run(saved_by(1, model=before), 1, model=now)
    with pytest.raises(UserError, match=r"model.weights.a was None and is -1.0"):
        same_run(saved_by(1, model={"weights": None}), 1, model={"weights": {"a": -1.0}})
    with_callback = {"callbacks": [{"class_path": "x.SampleLogger"}]}
    assert same_run(saved_by(1, trainer=with_callback), 1, trainer={"callbacks": []})  # noted, and allowed


SAVE = {"class_path": "elastic_lightning.callbacks.SavePretrained"}
RESET = {"class_path": "elastic_lightning.callbacks.ElasticReset", "init_args": {"every": 3, "offload": False}}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ([SAVE, RESET], [SAVE], "ElasticReset.class_path was 'elastic_lightning.callbacks.ElasticReset' and is None"),
        ([SAVE], [SAVE, RESET], "ElasticReset.class_path was None and is 'elastic_lightning.callbacks.ElasticReset'"),
        ([RESET], [RESET | {"init_args": {"every": 9}}], "ElasticReset.init_args.every was 3 and is 9"),
        ([RESET], [RESET, RESET], "ElasticReset.class_path was"),
    ],
)
@pytest.mark.parametrize("same_version", [True, False])
def test_what_moves_the_weights_is_part_of_a_run(before, now, said, same_version):
    checkpoint = saved_by(1, trainer={"callbacks": before}) | {"method": ["ElasticReset"] * (RESET in before)}
    given = {"trainer": {"callbacks": now}}, Path("a.ckpt"), 1, same_version, ["ElasticReset"] * (now != [SAVE])
    with pytest.raises(UserError, match=rf"{re.escape(said)}.*or give --another_method=true"):
        check_same_run(checkpoint, *given)
    assert all("ElasticReset" in line for line in check_same_run(checkpoint, *given, another_method=True))


def test_where_an_average_is_kept_is_no_part_of_a_run():
    there = RESET | {"init_args": {"every": 3, "offload": True}}
    checkpoint = saved_by(1, trainer={"callbacks": [RESET]}) | {"method": ["ElasticReset"]}
    assert len(same_run(checkpoint, 1, trainer={"callbacks": [there]})) == 1  # noted


def test_a_run_does_not_lose_elastic_reset_unless_it_is_asked_to(finished, toy_fit, monkeypatch, capsys):
    """And a run on another number of threads says that sums are rounded otherwise."""
    without = [*toy_fit(), "--trainer.callbacks=[SavePretrained]", "--ckpt_path=last"]
    assert main(without) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "ElasticReset" in error and "--another_method=true" in error
    threads = torch.get_num_threads()
    monkeypatch.setattr("elastic_lightning.callbacks.run_config.torch.get_num_threads", lambda: threads + 2)
    assert main([*without, "--another_method=true"]) == 0
    printed = capsys.readouterr().out
    assert "note: trainer.callbacks.ElasticReset.class_path is None here" in printed
    assert f"note: threads: {threads + 2} here, and {threads} when the checkpoint was written: sums are" in printed
    assert "another_method: false" in (finished / "config.yaml").read_text()


OTHERS = {  # what a checkpoint may hold in place of what is written here
    "loops": [{}, {"fit_loop": 1}, None],
    "callbacks": [[], dict.fromkeys(["ElasticReset", "BatchCheckpoint"], 3), {"ElasticReset": {"batches": 1}}],
    "position": [{"epoch": 1}, 5, dict.fromkeys(["epoch", "batches", "epoch_batches", "total", "logged"], "x")],
    "optimizer_states": [{}, [], [{}], [{"state": {0: 1}, "param_groups": []}]],
    "lr_schedulers": [None],
    "config": [["a"], "a"],
    "world_size": ["two"],
    "run_log": [5],
    "state_dict": [[]],
    "ppo_step": ["x"],
}
QUICK = [("position", 0), ("callbacks", 1)]
ALL = [(name, index) for name, values in OTHERS.items() for index in range(len(values)) if (name, index) not in QUICK]


@pytest.mark.parametrize(
    ("name", "index"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)], ids=str
)
def test_a_checkpoint_that_is_built_otherwise_is_one_line(name, index, finished, toy_fit, capsys):
    path = finished / "checkpoints" / "batch_000003.ckpt"
    torch.save(torch.load(path, weights_only=True) | {name: OTHERS[name][index]}, path)
    before = scalars(finished)
    assert main([*toy_fit(), callbacks(1), f"--ckpt_path={path}"]) == 1
    assert re.search("checkpoint", capsys.readouterr().err.splitlines()[-1])
    assert scalars(finished) == before


def test_an_option_that_one_version_alone_has_says_nothing():
    checkpoint = saved_by(1, model={"lr": 1})
    assert check_same_run(checkpoint, {"model": {"lr": 1, "new": 0}}, Path("a.ckpt"), 1, same_version=False) == []
    with pytest.raises(UserError, match=r"model.new was None and is 0"):
        same_run(checkpoint, 1, model={"lr": 1, "new": 0})


def test_rows_of_a_batch_are_those_of_all_processes():
    eight, four = {"init_args": {"batch_size": 8}}, {"init_args": {"batch_size": 4}}
    assert same_run(saved_by(1, data=eight), 2, data=four) == []
    assert same_run(saved_by(2, data=four), 1, data=eight) == []
    with pytest.raises(UserError, match="batch_size was 8 and is 8 on each of 2 processes"):
        same_run(saved_by(1, data=eight), 2, data=eight)
    with pytest.raises(UserError, match="batch_size was 8 and is 4"):
        same_run(saved_by(1, data=eight), 1, data=four)


def test_a_run_with_checkpoints_of_lightnings_own_resumes_exactly_too(toy_fit, tmp_path, at_batch):
    flags = ["--trainer.callbacks=[{class_path: ElasticReset, init_args: {every: 3}}, {class_path: ModelCheckpoint}]"]
    calm = at_batch(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*toy_fit(version="stopped"), *flags]) == 0
    calm()
    assert main([*toy_fit(version="stopped"), *flags, "--ckpt_path=last"]) == 0
    assert main([*toy_fit(version="whole"), *flags]) == 0
    assert scalars(tmp_path / "run" / "stopped") == scalars(tmp_path / "run" / "whole")


def test_the_checkpoint_that_a_run_goes_on_from_is_the_last_one(finished, toy_fit, at_batch):
    """Killed before it saved anew, it goes on from there again, and not from what is given up."""
    path = finished / "checkpoints" / "batch_000003.ckpt"
    calm = at_batch(4, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([*toy_fit(), callbacks(5), f"--ckpt_path={os.path.relpath(path)}"])
    calm()
    assert last_checkpoint(finished) == path
    assert main([*toy_fit(), callbacks(1), "--ckpt_path=last"]) == 0
    assert [step for step, _ in scalars(finished)["train/reward"]] == [1, 2, 3, 4]


def test_a_measured_run_stays_as_it_is(finished, toy_fit, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for command in ("validate", "test", "predict"):
        assert main([*toy_fit(command=command), "--data.init_args.eval_prompts=4", "--ckpt_path=last"]) == 0
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {
        "test.json",
        "predictions.jsonl",
        "samples_validate.jsonl",
    }
    assert all(after[path] == content for path, content in before.items())


def test_a_csv_log_is_not_lost(finished, toy_fit, capsys):
    place = f"{{save_dir: {finished.parents[1]}, name: run, version: seed_1}}"
    logger = f"--trainer.logger={{class_path: CSVLogger, init_args: {place}}}"
    (finished / "metrics.csv").write_text("step\n1\n")
    assert main([*toy_fit(), callbacks(1), logger, "--ckpt_path=last"]) == 1
    assert "a CSVLogger begins its file anew" in capsys.readouterr().err
    assert (finished / "metrics.csv").read_text() == "step\n1\n"


def test_the_line_to_resume_replaces_the_checkpoint():
    assert resume_line(["fit", "--ckpt_path", "a", "--x=b c"]) == "elastic-lightning fit '--x=b c' --ckpt_path=last"
    assert resume_line(["fit", "--ckpt_path=a"]) == "elastic-lightning fit --ckpt_path=last"


def test_errors_that_lead_to_one_another_are_read_once():
    first, second = ValueError("first"), OSError("second")
    first.__cause__, second.__context__ = second, first
    assert _chain(first) == [first, second]
