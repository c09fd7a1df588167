"""The examples of docs/examples run, and do what docs/how-to says."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

PRINTED = {
    "length_reward.py": "[0.1111111119389534, 1.0]",  # 1 / (1 + 8), float32
    "median_baseline.py": "[[-1.0, -1.0], [0.0, 0.0], [4.0, 4.0]]",
    "reset_on_drift.py": "1.0 False\n6.0 True\n3.0 False",
}


@pytest.fixture(autouse=True)
def estimators_as_they_were(monkeypatch):
    from elastic_lightning.algorithms.ppo import advantages

    monkeypatch.setattr(advantages, "ESTIMATORS", advantages.ESTIMATORS)
    before = dict(advantages.ESTIMATORS)
    yield
    advantages.ESTIMATORS.clear()
    advantages.ESTIMATORS.update(before)


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_examples_print_what_they_should(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.strip() == PRINTED[name]


def test_an_estimator_of_ones_own_trains(tmp_path, tiny_ppo):
    runpy.run_path(str(EXAMPLES / "median_baseline.py"))
    module, fit = tiny_ppo(advantage="median", samples_per_prompt=3, mini_batches=1)
    trainer = fit(module)
    assert module.ppo_step == 2 and trainer.callback_metrics["train/first_ratio_deviation"] < 1e-5


def test_a_reset_on_drift_resets_where_the_logged_kl_is_above_the_limit(tiny_ppo):
    example = runpy.run_path(str(EXAMPLES / "reset_on_drift.py"))
    kls = []

    class Watching(example["ResetOnDrift"]):
        def should_reset(self, state):
            kls.append(state.kl)
            return super().should_reset(state)

    module, fit = tiny_ppo(learning_rate=1e-2, batches=8)
    limit = 0.3
    callback = Watching(limit=limit, decay=0.5)
    before = []
    callback.before_reset = lambda trainer, pl_module: before.append(module.ppo_step)
    fit(module, [callback])
    assert [step for step, kl in enumerate(kls, start=1) if kl > limit] == before
    assert before and len(before) < 8
    assert all(torch.equal(callback.ema[name], callback.initial[name]) for name in callback.ema) == (before[-1] == 8)
