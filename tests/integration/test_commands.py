"""The commands, run in-process as a user would run them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_lightning.cli import main


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


CALLBACKS = (
    "--trainer.callbacks=[{class_path: ElasticReset, init_args: {every: 2}}, {class_path: SampleLogger}, "
    "{class_path: SavePretrained, init_args: {monitor: val/reward}}, "
    "{class_path: BatchCheckpoint, init_args: {every: 2}}]"
)


@pytest.fixture
def finished(toy_fit, tmp_path):
    """A finished Elastic Reset run of four PPO batches, reset at every second."""
    assert main([*toy_fit(), CALLBACKS]) == 0
    return tmp_path / "run" / "seed_1"


def test_fit_leaves_everything_a_user_looks_for(finished):
    values = scalars(finished)
    assert list(values["train/reward"]) == [1, 2, 3, 4]
    assert list(values["val/reward"]) == list(values["val/toy_accept"]) == [0, 2, 4]
    assert list(values["reset/count"]) == [2, 4]
    assert values["val/kl"][0] == pytest.approx(0, abs=1e-6)
    assert all(value == pytest.approx(1, abs=1e-5) for value in values["train/first_ratio"].values())
    rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [row["ppo_step"] for row in rows] == [0] * 8 + [2] * 8 + [4] * 8
    for name in ("final", "best"):
        AutoModelForCausalLM.from_pretrained(finished / name)
        AutoTokenizer.from_pretrained(finished / name)
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        "batch_000002.ckpt",
        "batch_000004.ckpt",
    ]
    assert (finished / "config.yaml").exists()


def test_every_number_the_issue_asks_for_is_logged(finished):
    values = scalars(finished)
    train = (
        "reward reward_std kl kl_k3 kl_per_token kl_k3_per_token entropy policy_loss value_loss clip_fraction "
        "value_clip_fraction explained_variance ratio first_ratio length eos_rate grad_norm learning_rate "
        "kl_coefficient"
    )
    validation = (
        "reward kl perplexity sample_perplexity distinct_1 distinct_2 distinct_3 entropy length toy_accept toy_nll"
    )
    expected = {f"train/{name}" for name in train.split()} | {f"val/{name}" for name in validation.split()}
    expected |= {f"time/{s}_{u}" for s in ("rollout", "scoring", "update") for u in ("seconds", "tokens_per_second")}
    assert expected <= set(values)


def test_predict_writes_jsonl(finished, toy_fit, toy, tmp_path, capsys):
    arguments = [*toy_fit(command="predict", version="predict"), f"--model.init_args.policy.path={finished}/final"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "predict" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert set(rows[0]) == {"prompt", "response", "complete", "reward"}
    assert "predictions.jsonl" in capsys.readouterr().out


def test_validate_and_test_print_and_write(finished, toy_fit, tmp_path, capsys):
    checkpoint = f"--ckpt_path={finished}/checkpoints/batch_000004.ckpt"
    assert main([*toy_fit(command="validate", version="validate"), checkpoint]) == 0
    assert "val/toy_accept" in capsys.readouterr().out
    assert main([*toy_fit(command="test", version="test"), checkpoint]) == 0
    assert "test/kl" in json.loads((tmp_path / "run" / "test" / "test.json").read_text())


def test_explicit_flags_win_over_a_checkpoint(finished, toy_fit, capsys):
    arguments = [
        *toy_fit(command="validate", version="validate"),
        f"--ckpt_path={finished}/checkpoints/batch_000004.ckpt",
        "--model.init_args.sampling.temperature=0.25",
    ]
    assert main(arguments) == 0
    assert "temperature is 0.25 here, and was 1.0" in capsys.readouterr().out


def test_resuming_continues_the_count(finished, toy_fit):
    checkpoint = f"--ckpt_path={finished}/checkpoints/batch_000002.ckpt"
    assert main([*toy_fit(), CALLBACKS, checkpoint, "--trainer.max_epochs=2"]) == 0
    assert max(scalars(finished)["train/reward"]) >= 4


def test_generate_from_folder_and_checkpoint(finished, tmp_path, capsys):
    flags = ["--prompt=the film was", "--prompt=i", "--samples=2", "--max_new_tokens=5", "--min_new_tokens=5"]
    assert main(["generate", f"--model={finished}/final", *flags, f"--output={tmp_path}/a.jsonl"]) == 0
    assert main(["generate", f"--model={finished}/checkpoints/batch_000004.ckpt", *flags]) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[0]["prompt"] == "the film was"
    assert all(row["prompt"] + row["response"] in printed for row in rows)  # both hold the same weights


def test_generate_says_what_is_wrong(finished, capsys):
    assert main(["generate", f"--model={finished}/final"]) == 1
    assert "--prompt" in capsys.readouterr().err
    assert main(["generate", f"--model={finished}/final", "--prompt=a", "--max_new_tokens=500"]) == 1
    assert "context is 128" in capsys.readouterr().err
    assert main(["generate", "--model=./nowhere", "--prompt=a"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_checkpoints_hold_no_frozen_weights_and_load_safely(finished):
    checkpoint = torch.load(finished / "checkpoints" / "batch_000004.ckpt", weights_only=True)
    assert all(name.startswith("actor.") for name in checkpoint["state_dict"])
    assert checkpoint["ppo_step"] == 4


def test_report_of_the_run(finished, tmp_path, capsys):
    assert main(["report", str(tmp_path / "run"), f"--output={tmp_path}/report"]) == 0
    assert (tmp_path / "report" / "frontier.png").stat().st_size > 10_000
    header, *rows = (tmp_path / "report" / "table.csv").read_text().splitlines()
    assert header.startswith("method,seed,ppo_step,reward,kl,perplexity") and "toy_accept" in header
    assert len(rows) == 3


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "pipeline" in capsys.readouterr().out
    assert main(["--version"]) == 0
