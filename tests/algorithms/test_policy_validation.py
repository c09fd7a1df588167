"""Validation of a policy against plain loops, and where its numbers are logged."""

import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from elastic_lightning.algorithms import PPO, Execution
from elastic_lightning.metrics import LanguageModelNLL
from elastic_lightning.policies import Prompts, Sampling


def human(toy, rows=3, length=9, seed=9):
    return torch.randint(0, 27, (rows, length), generator=torch.Generator().manual_seed(seed))


def validate(toy, module, batches, root):
    trainer = toy.trainer(root)
    trainer.validate(module, toy.loader(batches), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.fixture
def moved(toy):
    module = toy.ppo(
        sampling={"temperature": 0.7}, execution=Execution(scoring_batch_size=3), reward=toy.reward_class("w18")
    )
    toy.perturb(module, 0.05)
    module.ppo_step = 1
    return module


def test_against_brute_force(toy, moved, tmp_path):
    batch, text = toy.prompts(rows=7), human(toy)
    rollout = moved.sample(batch, -1)
    values = validate(toy, moved, [batch, text], tmp_path)

    policy, initial = toy.plain_model(), toy.plain_model()
    policy.load_state_dict(moved.actor.lm.model.state_dict())
    kl, entropies, sample_nll, rewards, grams = [], [], [], [], {1: [], 2: [], 3: []}
    for row in range(7):
        prompt = batch.tokens[row][batch.mask[row]].tolist()
        response = rollout.tokens[row][rollout.mask[row]].tolist()
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            at = slice(len(prompt) - 1, -1)
            p = torch.log_softmax(policy(ids).logits[0, at] / 0.7, -1)
            q = torch.log_softmax(initial(ids).logits[0, at] / 0.7, -1)
            untempered = torch.log_softmax(initial(ids).logits[0, at], -1)
        kl.append((p.exp() * (p - q)).sum().item())
        entropies += [-(line.exp() * line).sum().item() for line in p]
        sample_nll += [-untempered[t, token].item() for t, token in enumerate(response)]
        words = [token for token in response if token < 27]
        rewards.append(words.count(18) / max(len(words), 1))
        for n in grams:
            grams[n] += [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
    with torch.no_grad():
        logits = policy(text).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    assert values["val/kl"] == pytest.approx(sum(kl) / 7, rel=1e-4)
    assert values["val/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert values["val/sample_perplexity"] == pytest.approx(math.exp(sum(sample_nll) / len(sample_nll)), rel=1e-4)
    assert values["val/reward"] == pytest.approx(sum(rewards) / 7, abs=1e-6)
    assert values["val/length"] == pytest.approx(rollout.mask.sum().item() / 7)
    assert values["val/eos_rate"] == pytest.approx((rollout.tokens == toy.eos).any(1).float().mean().item())
    assert values["val/perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    for n, found in grams.items():
        assert values[f"val/distinct_{n}"] == pytest.approx(len(set(found)) / len(found))
    assert values["val/kl"] > 0.05 and len(set(rewards)) > 1


def test_the_draws_are_the_same_each_time_and_unlike_those_of_training(toy, moved, tmp_path):
    batches = [toy.prompts(rows=5, seed=seed) for seed in range(2)]
    first = validate(toy, moved, batches, tmp_path)
    moved.ppo_step = 17
    assert validate(toy, moved, batches, tmp_path) == first
    tokens = [moved.sample(batches[0], step).tokens[:, 0].tolist() for step in (-1, 0, 1, 17)]
    assert len({tuple(row) for row in tokens}) > 1


@pytest.mark.parametrize("size", [1, 4, 7, 10])
def test_the_draws_do_not_depend_on_the_batch_size(toy, moved, tmp_path, size):
    tokens, mask = toy.prompts(rows=10)
    whole = validate(toy, moved, [Prompts(tokens, mask)], tmp_path)
    parts = [Prompts(*pair) for pair in zip(tokens.split(size), mask.split(size), strict=True)]  # the last is shorter
    assert validate(toy, moved, parts, tmp_path) == pytest.approx(whole, rel=1e-5)
    again = validate(toy, moved, [human(toy), *parts], tmp_path)  # nor on what comes between
    assert {name: again[name] for name in whole} == pytest.approx(whole, rel=1e-5)


def test_predictions_are_those_that_validation_measures(toy, moved, tmp_path):
    tokens, mask = toy.prompts(rows=10)
    parts = [Prompts(*pair) for pair in zip(tokens.split(4), mask.split(4), strict=True)]
    rows = [row for batch in toy.trainer(tmp_path).predict(moved, toy.loader(parts)) for row in batch]
    assert len(rows) == 10
    assert set(rows[0]) == {"prompt", "response", "complete", "reward"}
    texts = moved.score(Prompts(tokens, mask), moved.sample(Prompts(tokens, mask), -1).responses)[0]
    assert [row["response"] for row in rows] == texts.responses
    assert [row["prompt"] for row in rows] == texts.prompts
    reward = validate(toy, moved, parts, tmp_path)["val/reward"]
    assert sum(row["reward"] for row in rows) / 10 == pytest.approx(reward, abs=1e-6)


def test_an_unmoved_policy_has_not_drifted(toy, tmp_path):
    module = toy.ppo()
    values = validate(toy, module, [toy.prompts(rows=8)], tmp_path)
    assert values["val/kl"] == pytest.approx(0, abs=1e-6)
    assert "val/perplexity" not in values  # no human text was given: no number is made up


def test_lora_measures_drift_with_the_adapter_off(toy, tmp_path):
    module = toy.ppo(lora=True)
    assert validate(toy, module, [toy.prompts(rows=8)], tmp_path)["val/kl"] == pytest.approx(0, abs=1e-6)
    toy.perturb(module, 0.3)
    assert validate(toy, module, [toy.prompts(rows=8)], tmp_path)["val/kl"] > 0.01


@pytest.mark.parametrize(("sanity", "first"), [(-1, [0, 1, 2]), (2, [1, 2]), (0, [1, 2])])
def test_the_start_is_logged_at_step_0(toy, tmp_path, read_events, sanity, first):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    module = toy.ppo(learning_rate=1e-2)
    trainer = toy.trainer(tmp_path, logger=logger, num_sanity_val_steps=sanity, val_check_interval=1)
    validation = toy.loader([toy.prompts(rows=4, seed=s) for s in range(3)] + [human(toy)])
    trainer.fit(module, toy.loader([toy.prompts(seed=s) for s in range(2)]), validation)
    curves = read_events(logger.log_dir)
    for tag in ("val/reward", "val/kl", "val/perplexity", "val/sample_perplexity", "val/distinct_1"):
        steps = [step for step, _ in curves.get(tag, [])]
        assert steps == first, tag
    if sanity == -1:
        assert curves["val/kl"][0][1] == pytest.approx(0, abs=1e-6)
        assert curves["val/kl"][1][1] > 1e-4
    assert trainer.callback_metrics["val/reward"] == pytest.approx(curves["val/reward"][-1][1])


def test_test_logs_the_same_numbers(toy, moved, tmp_path):
    batches = [toy.prompts(rows=5), human(toy)]
    trainer = toy.trainer(tmp_path)
    trainer.test(moved, toy.loader(batches), verbose=False)
    tested = {name.removeprefix("test/"): value.item() for name, value in trainer.callback_metrics.items()}
    validated = validate(toy, moved, batches, tmp_path)
    assert tested == {name.removeprefix("val/"): value for name, value in validated.items()}


def test_a_policy_that_is_its_own_reference_is_not_tested_for_drift(toy, tmp_path):
    trainer = toy.trainer(tmp_path)
    trainer.test(toy.ppo(), toy.loader([toy.prompts(rows=5)]), verbose=False)
    assert "test/reward" in trainer.callback_metrics and "test/kl" not in trainer.callback_metrics


def test_components_of_a_reward_are_logged(toy, tmp_path, read_events):
    from elastic_lightning.rewards import WeightedReward

    reward = WeightedReward({"a": toy.reward_class("w3"), "b": toy.reward_class("w5")}, {"b": -2.0})
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    toy.fit(toy.ppo(reward=reward), tmp_path, [toy.prompts(rows=12)], logger=logger)
    curves = read_events(logger.log_dir)
    total, a, b = (curves[f"train/{name}"][0][1] for name in ("reward", "reward_a", "reward_b"))
    assert total == pytest.approx(a - 2 * b, abs=1e-6) and a + b > 0


def test_drift_is_measured_from_the_start_after_the_reference_moved(toy, tmp_path):
    from elastic_lightning.callbacks import ReferenceReset

    module = toy.ppo(learning_rate=1e-2)
    start = {name: p.clone() for name, p in module.reference.lm.named_parameters()}
    trainer = toy.trainer(tmp_path, callbacks=[ReferenceReset(every=1)])
    trainer.fit(module, toy.loader([toy.prompts(seed=s) for s in range(2)]), toy.loader([toy.prompts(rows=8)]))
    drift = trainer.callback_metrics["val/kl"].item()
    assert drift > 1e-3
    assert all(torch.equal(p, start[name]) for name, p in module.initial.lm.named_parameters())
    trainer.validate(module, toy.loader([toy.prompts(rows=8)]), verbose=False)  # sets the module up again
    assert trainer.callback_metrics["val/kl"].item() == pytest.approx(drift, rel=1e-5)


def test_a_language_model_of_its_own_reads_the_samples(toy, tmp_path):
    def build():
        metrics = [LanguageModelNLL(toy.folder, name="english_nll")]
        return PPO(toy.source(), toy.reward_class(), sampling=Sampling(max_new_tokens=6), metrics=metrics, seed=0)

    module, batch, model = build(), toy.prompts(rows=7), toy.plain_model()
    rows = [row[keep].tolist() for row, keep in zip(*module.sample(batch, -1).responses, strict=True)]
    nats = []
    for row in ([token for token in row if token < 27 or token == toy.eos] for row in rows):  # <unk> is no text
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([[toy.eos, *row]])).logits[0], -1)
        nats += [-logprobs[place, token].item() for place, token in enumerate(row)]
    trainer = toy.trainer(tmp_path)
    trainer.validate(module, toy.loader([batch]), verbose=False)
    assert trainer.callback_metrics["val/english_nll"].item() == pytest.approx(sum(nats) / len(nats), rel=1e-5)

    trainer = toy.fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert saved and all(name.startswith("actor.") for name in saved)
    assert not any("metric" in name for name in module.state_dict())
    toy.trainer(tmp_path).validate(build(), toy.loader([batch]), ckpt_path=tmp_path / "saved.ckpt", verbose=False)


def test_a_fit_that_validates_may_follow_a_validation(toy, tmp_path):
    """Lightning resets metrics in inference mode, and what is made there cannot be changed in place later."""
    module, loader = toy.ppo(), toy.loader([toy.prompts(), human(toy)])
    toy.trainer(tmp_path).validate(module, loader, verbose=False)
    trainer = toy.trainer(tmp_path, check_val_every_n_epoch=1)
    trainer.fit(module, toy.loader([toy.prompts()]), loader)
    assert trainer.callback_metrics["val/length"] > 0
