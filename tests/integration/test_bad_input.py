"""What a user can get wrong: one clear line, a non-zero status, nothing overwritten, and soon."""

import gzip
import json
import time

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from elastic_lightning.cli import main

LIMIT = 20  # seconds, of which starting Python is not part here


def reward_module(tmp_path, monkeypatch, body):
    (tmp_path / "my_reward.py").write_text(f"def reward(prompts, responses):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_reward", raising=False)
    return ["--model.init_args.reward=FunctionReward", "--model.init_args.reward.init_args.function=my_reward.reward"]


def without_pad(toy, tmp_path):
    """A policy whose tokenizer has no pad token: not an error, it gets one."""
    import shutil

    shutil.copytree(toy / "policy", tmp_path / "policy")
    path = tmp_path / "policy" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    path.write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").pad_token is None
    return [f"--model.init_args.policy.path={tmp_path}/policy"]


def other_model(toy, tmp_path):
    path = tmp_path / "other.ckpt"
    state = {"actor.lm.model.transformer.wte.weight": torch.zeros(3, 3)}
    loops = {"callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "loops": {}, "epoch": 0, "global_step": 0}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {}, **loops}, path)
    return [f"--ckpt_path={path}"]


def data_file(tmp_path, rows, name="train.jsonl"):
    folder = tmp_path / "data"
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return [
        "--data=IMDBDataModule",
        f"--data.init_args.path={folder}",
        "--data.init_args.batch_size=8",
        "--data.init_args.eval_texts=8",
    ]


def reset_callback(**arguments):
    return "--trainer.callbacks=" + yaml.safe_dump(
        [{"class_path": "ElasticReset", "init_args": {"every": 2, **arguments}}], default_flow_style=True
    )


REVIEWS = [{"text": f"a film number {i} that i saw with my brother", "label": i % 2} for i in range(40)]

# name -> (extra arguments of the fit, words of the message)
CASES = {
    "unknown trainer key": (lambda toy, tmp, mp: ["--trainer.max_epoch=3"], ["trainer.max_epoch"]),
    "unknown model key": (lambda toy, tmp, mp: ["--model.init_args.ppo.clipp=3"], ["clipp", "PPO"]),
    "wrong type": (lambda toy, tmp, mp: ["--model.init_args.ppo.clip=high"], ["ppo.clip", "float", "high"]),
    "unknown class": (lambda toy, tmp, mp: ["--model=PPOO"], ["PPOO"]),
    "missing policy folder": (lambda toy, tmp, mp: ["--model.init_args.policy.path=./nowhere"], ["no such folder"]),
    "hub id offline": (
        lambda toy, tmp, mp: ["--model.init_args.policy.path=nobody/no-such-model"],
        ["nobody/no-such-model", "save_pretrained folder"],
    ),
    "hub data offline": (lambda toy, tmp, mp: ["--data=IMDBDataModule"], ["stanfordnlp/imdb", "data.init_args.path"]),
    "prompt longer than the context": (
        lambda toy, tmp, mp: ["--model.init_args.sampling.max_new_tokens=100", "--data.init_args.max_prompt_tokens=64"],
        ["context is 128", "max_prompt_tokens"],
    ),
    "empty data": (lambda toy, tmp, mp: data_file(tmp, []), ["train.jsonl", "empty"]),
    "data too small": (lambda toy, tmp, mp: data_file(tmp, REVIEWS[:5]), ["less than one batch"]),
    "missing column": (
        lambda toy, tmp, mp: data_file(tmp, [{"review": "good", "label": 1}]),
        ["no column 'text'", "text_column"],
    ),
    "wrong labels": (
        lambda toy, tmp, mp: data_file(tmp, [{"text": "good", "label": 7}], "train.jsonl.gz"),
        ["must hold 0 and 1", "7"],
    ),
    "missing data path": (
        lambda toy, tmp, mp: ["--data=IMDBDataModule", f"--data.init_args.path={tmp}/nowhere"],
        ["does not exist"],
    ),
    "reward raises": (lambda toy, tmp, mp: reward_module(tmp, mp, "raise KeyError('stars')"), ["KeyError", "stars"]),
    "reward is NaN": (lambda toy, tmp, mp: reward_module(tmp, mp, "return [float('nan')] * len(responses)"), ["nan"]),
    "reward of wrong length": (lambda toy, tmp, mp: reward_module(tmp, mp, "return [0.0]"), ["one score a response"]),
    "reward not found": (
        lambda toy, tmp, mp: [
            "--model.init_args.reward=FunctionReward",
            "--model.init_args.reward.init_args.function=no_such_module.reward",
        ],
        ["no_such_module"],
    ),
    "unknown label": (lambda toy, tmp, mp: ["--model.init_args.reward.init_args.label=HAPPY"], ["HAPPY", "POSITIVE"]),
    "checkpoint of another model": (lambda toy, tmp, mp: other_model(toy, tmp), ["another model"]),
    "checkpoint missing": (lambda toy, tmp, mp: ["--ckpt_path=nowhere.ckpt"], ["no checkpoint at nowhere.ckpt"]),
    "reset interval 0": (lambda toy, tmp, mp: [reset_callback(every=0)], ["every", "got 0"]),
    "decay 1.5": (lambda toy, tmp, mp: [reset_callback(decay=1.5)], ["decay", "got 1.5"]),
    "unknown callback key": (lambda toy, tmp, mp: [reset_callback(evry=3)], ["evry"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(name, toy, toy_fit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("elastic_lightning.policies.loading.constants.HF_HUB_OFFLINE", True)
    make, words = CASES[name]
    start = time.monotonic()
    status = main(toy_fit() + make(toy, tmp_path, monkeypatch))
    seconds = time.monotonic() - start
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status != 0
    assert error.startswith("error: ") and len(error) < 600
    assert all(word in error for word in words), error
    assert seconds < LIMIT
    assert not any((tmp_path / "run").rglob("*"))  # nothing half-made stands in the way of the next try


def test_a_tokenizer_without_pad_token_gets_one(toy, toy_fit, tmp_path):
    assert main([*toy_fit(), *without_pad(toy, tmp_path)]) == 0


def test_a_finished_run_is_not_written_over(toy_fit, tmp_path, capsys):
    assert main(toy_fit()) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(toy_fit()) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_no_or_unknown_command(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out
    assert main(["fitt"]) == 1
    assert "unknown command 'fitt'" in capsys.readouterr().err


def test_missing_config_file(capsys):
    assert main(["fit", "--config=nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_an_abbreviated_flag_is_refused(toy_fit, capsys):
    assert main([*toy_fit(), "--seed_every=3"]) == 2
    assert "seed_every" in capsys.readouterr().err
