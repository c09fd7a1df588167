"""Reward models of preferences on the command line: trained from a policy, then the reward of PPO."""

import json

import pytest
import yaml
from test_commands import scalars

from elastic_lightning.cli import main


@pytest.fixture
def reward_models(toy, tmp_path):
    """Two of them, trained from the same policy with LoRA and saved in both ways."""
    folders = []
    for seed, adapter in ((1, "merged"), (2, "adapter")):
        config = {
            "seed_everything": seed,
            "model": {
                "class_path": "PreferenceModel",
                "init_args": {
                    "classifier": {"path": f"{toy}/policy", "lora": {"rank": 4}},
                    "margin_weight": 0.1,
                    "optimizer": {"learning_rate": 1e-2, "warmup": 0},
                },
            },
            "data": {"class_path": "pair_data.RandomPairs"},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "enable_model_summary": False,
                "logger": {
                    "class_path": "TensorBoardLogger",
                    "init_args": {"save_dir": str(tmp_path), "name": "reward_model", "version": f"seed_{seed}"},
                },
                "callbacks": [{"class_path": "SavePretrained", "init_args": {"adapter": adapter}}],
            },
        }
        path = tmp_path / f"reward_model_{seed}.yaml"
        path.write_text(yaml.safe_dump(config))
        assert main(["fit", f"--config={path}"]) == 0
        folders.append(tmp_path / "reward_model" / f"seed_{seed}")
    return folders


def test_reward_models_become_an_ensemble(reward_models, toy_fit, tmp_path):
    values = scalars(reward_models[0])
    assert set(values) >= {"train/loss", "train/accuracy", "val/accuracy", "val/accuracy_low", "val/length_correlation"}
    assert main(["test", f"--config={tmp_path}/reward_model_1.yaml"]) == 0
    tested = json.loads((reward_models[0] / "test.json").read_text())
    assert tested["test/pairs"] == 8 and "test/calibration_error" in tested
    paths = [str(folder / "final") for folder in reward_models]
    options = {"paths": paths, "combine_by": "lower_bound", "deviations": 0.5}
    reward = {"class_path": "EnsembleReward", "init_args": options}
    overlay = tmp_path / "reward.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"reward": reward}}}))
    arguments = [argument for argument in toy_fit() if "reward.init_args" not in argument]
    arguments.insert(2, f"--config={overlay}")
    assert main([*arguments, "--trainer.limit_train_batches=1", "--trainer.val_check_interval=1"]) == 0
    trained = scalars(tmp_path / "run" / "seed_1")
    first, second, total = (trained[f"train/{name}"][1] for name in ("reward_seed_1", "reward_seed_2", "reward"))
    assert first != second and total < (first + second) / 2


@pytest.mark.parametrize("kind", ["WeightAveragedReward", "PreferenceReward"])
def test_a_policy_is_no_reward_model(toy, toy_fit, tmp_path, kind, capsys):
    given = {"path": f"{toy}/policy"} if kind == "PreferenceReward" else {"paths": [f"{toy}/policy", f"{toy}/other"]}
    overlay = tmp_path / "reward.yaml"
    reward = {"class_path": kind, "init_args": given}
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"reward": reward}}}))
    arguments = [argument for argument in toy_fit() if "reward.init_args" not in argument]
    arguments.insert(2, f"--config={overlay}")
    assert main(arguments) == 2
    assert main(arguments) == 2  # the parser wraps what a constructor raises
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "holds no GPT2ForSequenceClassification" in error and "score.weight" in error
