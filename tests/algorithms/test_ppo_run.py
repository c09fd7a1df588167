"""PPO over several batches: clock, schedules, logging, early stop, learning, failure."""

import json

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from elastic_lightning.algorithms import PPOConfig
from elastic_lightning.callbacks import BatchCheckpoint
from elastic_lightning.errors import UserError
from elastic_lightning.policies import Prompts


def batches(toy, count, rows=6):
    return [toy.prompts(rows=rows, seed=seed) for seed in range(count)]


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.actor.named_parameters()}


@pytest.fixture
def logger(tmp_path):
    return TensorBoardLogger(tmp_path, name="", version="run")


def test_ppo_step_is_the_clock_and_the_axis(toy, tmp_path, logger, read_events):
    module = toy.ppo(epochs=2, mini_batches=3)
    trainer = toy.fit(module, tmp_path, batches(toy, 4), logger=logger)
    assert module.ppo_step == 4
    assert trainer.global_step == 4 * 2 * 3
    curves = read_events(logger.log_dir)
    for tag in ("train/reward", "train/kl", "train/first_ratio", "time/samples_per_second"):
        assert [step for step, _ in curves[tag]] == [1, 2, 3, 4], tag
    assert [value for _, value in curves["train/optimizer_steps"]] == [6, 6, 6, 6]
    assert [value for _, value in curves["train/stopped_early"]] == [0, 0, 0, 0]
    wanted = "reward reward_std kl kl_k3 kl_per_token entropy policy_loss value_loss clip_fraction value_clip_fraction"
    wanted += " explained_variance ratio length eos_rate grad_norm learning_rate kl_coefficient"
    assert {f"train/{name}" for name in wanted.split()} <= set(curves)
    assert all(torch.isfinite(torch.tensor([value for _, value in points])).all() for points in curves.values())


def test_logged_numbers_are_those_of_the_batch(toy, tmp_path):
    module = toy.ppo()
    toy.perturb(module, 0.03)
    trainer = toy.fit(module, tmp_path, batches(toy, 1, rows=24))
    rollout, metrics = module.seen[0].rollout, trainer.callback_metrics
    words = [
        [f"w{token}" for token in row[mask] if token < 27]
        for row, mask in zip(rollout.tokens, rollout.mask, strict=True)
    ]
    rewards = torch.tensor([row.count("w3") / max(len(row), 1) for row in words])
    assert metrics["train/reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert metrics["train/reward_std"] == pytest.approx(rewards.std(unbiased=False).item(), abs=1e-5)
    assert metrics["train/length"] == rollout.mask.sum() / 24
    assert 0 < metrics["train/reward"] < 1 and metrics["train/kl"].abs() > 1e-3
    assert metrics["train/eos_rate"] == (rollout.tokens == toy.eos).any(1).float().mean()
    assert metrics["train/kl_per_token"] * metrics["train/length"] == pytest.approx(
        metrics["train/kl"].item(), rel=1e-4
    )


def test_kl_is_zero_at_the_first_batch(toy, tmp_path, logger, read_events):
    module = toy.ppo(learning_rate=1e-2)
    toy.fit(module, tmp_path, batches(toy, 2), logger=logger)
    first, second = (value for _, value in read_events(logger.log_dir)["train/kl_k3"])
    assert first == pytest.approx(0, abs=1e-8)
    assert second > 1e-4
    assert read_events(logger.log_dir)["train/kl"][0][1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("trunk", [False, True])
def test_the_reference_does_not_move(toy, tmp_path, trunk):
    module = toy.ppo(learning_rate=1e-2, separate_value_trunk=trunk)
    before = {name: p.clone() for name, p in module.reference.lm.named_parameters()}
    policy = weights(module)
    toy.fit(module, tmp_path, batches(toy, 2))
    assert all(torch.equal(p, before[name]) for name, p in module.reference.lm.named_parameters())
    assert all(not torch.equal(p, policy[name]) for name, p in module.actor.named_parameters() if "wpe" not in name)


def test_lora_moves_adapter_and_head_alone(toy, tmp_path):
    module = toy.ppo(lora=True, learning_rate=1e-2)
    before = weights(module)
    toy.fit(module, tmp_path, batches(toy, 2))
    moved = {name for name, p in module.actor.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name or "value_head" in name for name in moved)
    assert any("lora_A" in name for name in moved) and any("value_head" in name for name in moved)


def test_target_kl_stops_the_update(toy, tmp_path):
    options = {"epochs": 4, "mini_batches": 1, "learning_rate": 3e-2}
    trainer = toy.fit(toy.ppo(**options), tmp_path)
    far = trainer.callback_metrics["train/approx_kl"].item()
    module = toy.ppo(**options, target_kl=1e-4)
    trainer = toy.fit(module, tmp_path)
    assert trainer.callback_metrics["train/stopped_early"] == 1
    assert trainer.callback_metrics["train/optimizer_steps"] == trainer.global_step < 4
    assert trainer.global_step >= 1  # the first mini-batch has not moved
    assert module.ppo_step == 1
    trainer = toy.fit(toy.ppo(**options, target_kl=100 * far), tmp_path)
    assert trainer.callback_metrics["train/stopped_early"] == 0 and trainer.global_step == 4


def test_target_kl_counts_one_and_a_half_times():
    config = PPOConfig(target_kl=0.1)
    assert not config.stops_update(0.149) and config.stops_update(0.151)
    assert not PPOConfig().stops_update(1e9)


def test_the_schedule_steps_once_a_batch(toy, tmp_path, logger, read_events):
    module = toy.ppo(schedule="linear", warmup=2, learning_rate=8e-3, value_learning_rate=4e-3)
    rates = []
    step = module.on_before_optimizer_step

    def record(optimizer):
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
        step(optimizer)

    module.on_before_optimizer_step = record
    toy.fit(module, tmp_path, batches(toy, 3), max_epochs=2, logger=logger)
    factors = [0.5, 1, 1, 0.75, 0.5, 0.25]  # six PPO batches: two of warm-up, then down over the other four
    assert rates == pytest.approx([pytest.approx((8e-3 * f, 4e-3 * f)) for f in factors for _ in range(4)])
    logged = [value for _, value in read_events(logger.log_dir)["train/learning_rate"]]
    assert logged == pytest.approx([8e-3 * f for f in factors])  # the rate that the batch was trained with


def test_the_value_function_has_a_learning_rate_of_its_own(toy, tmp_path):
    module = toy.ppo(learning_rate=1e-12, value_learning_rate=1e-2, separate_value_trunk=True)
    before = weights(module)
    toy.fit(module, tmp_path)
    moved = {name: (p - before[name]).abs().max().item() for name, p in module.actor.named_parameters()}
    assert all(change < 1e-6 for name, change in moved.items() if name.startswith("lm."))
    assert moved["value_head.weight"] > 1e-3
    assert max(change for name, change in moved.items() if name.startswith("value_trunk")) > 1e-3


def test_the_adaptive_coefficient_follows_the_formula(toy, tmp_path, logger, read_events):
    options = {"kl_penalty": "adaptive", "kl_coefficient": 0.4, "kl_target": 0.05, "kl_horizon": 60}
    module = toy.ppo(**options, learning_rate=1e-2)
    toy.fit(module, tmp_path, batches(toy, 4), logger=logger)
    curves = read_events(logger.log_dir)
    expected = 0.4
    for (_, kl), (_, coefficient) in zip(curves["train/kl"], curves["train/kl_coefficient"], strict=True):
        assert coefficient == pytest.approx(expected, rel=1e-5)  # the coefficient that priced this batch
        expected *= 1 + min(max(kl / 0.05 - 1, -0.2), 0.2) * 6 / 60
    assert module.kl_controller.coefficient == pytest.approx(expected, rel=1e-5)
    assert len({value for _, value in curves["train/kl_coefficient"]}) > 2


def test_no_penalty_is_a_coefficient_of_zero(toy, tmp_path):
    trainer = toy.fit(toy.ppo(kl_penalty="none", kl_coefficient=5.0), tmp_path)
    assert trainer.callback_metrics["train/kl_coefficient"] == 0


def curve(toy, tmp_path, logger, read_events, count, **options):
    module = toy.ppo(head_noise=0.0, **options)
    toy.fit(module, tmp_path, batches(toy, count, rows=24), logger=logger)
    curves = read_events(logger.log_dir)
    return [v for _, v in curves["train/reward"]], [v for _, v in curves["train/kl"]]


def test_ppo_learns(toy, tmp_path, logger, read_events):
    rewards, kl = curve(toy, tmp_path, logger, read_events, 30, kl_penalty="none", learning_rate=5e-3)
    assert sum(rewards[:3]) / 3 < 0.15
    assert sum(rewards[-5:]) / 5 > 0.6
    assert sum(kl[-5:]) / 5 > 2


def test_reinforce_learns(toy, tmp_path, logger, read_events):
    options = {"epochs": 1, "mini_batches": 1, "learning_rate": 1e-2, "kl_penalty": "none"}
    rewards, _ = curve(toy, tmp_path, logger, read_events, 40, **options)
    assert sum(rewards[-5:]) / 5 > 0.4


def test_a_penalty_holds_the_policy_back(toy, tmp_path, read_events):
    ends = {}
    for coefficient in (0.0, 1.0):
        logger = TensorBoardLogger(tmp_path, name="", version=f"kl_{coefficient}")
        _, kl = curve(toy, tmp_path, logger, read_events, 20, kl_coefficient=coefficient, learning_rate=5e-3)
        ends[coefficient] = sum(kl[-5:]) / 5
    assert ends[1.0] < ends[0.0] / 3


def test_seeds_decide_everything(toy, tmp_path):
    ends = []
    for noise, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(noise)  # no global generator takes part
        module = toy.ppo(seed=seed)
        toy.fit(module, tmp_path, batches(toy, 2))
        ends.append((weights(module), module.seen[-1].rollout.tokens))
    (first, first_tokens), (same, same_tokens), (other, other_tokens) = ends
    assert torch.equal(first_tokens, same_tokens) and not torch.equal(first_tokens, other_tokens)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_successive_batches_of_the_same_prompts_draw_anew(toy, tmp_path):
    module = toy.ppo(learning_rate=1e-12)
    toy.fit(module, tmp_path, [toy.prompts()] * 2)
    first, second = (batch.rollout.tokens for batch in module.seen)
    assert first.shape != second.shape or not torch.equal(first, second)


def test_a_nan_reward_stops_the_run_and_leaves_the_checkpoint(toy, tmp_path):
    class Fails(toy.reward_class):
        calls = 0

        def forward(self, prompts, responses):
            Fails.calls += 1
            scores = super().forward(prompts, responses)
            if Fails.calls == 3:
                Fails.text = prompts[4] + responses[4]
                scores[4] = float("nan")
            return scores

    module = toy.ppo(reward=Fails(), max_skipped=0)
    with pytest.raises(UserError) as raised:
        toy.fit(module, tmp_path, batches(toy, 5), callbacks=[BatchCheckpoint(every=1)], enable_checkpointing=True)
    message = str(raised.value)
    assert "nan" in message and repr(Fails.text) in message and "\n" not in message
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["batch_000001.ckpt", "batch_000002.ckpt"]
    checkpoint = torch.load(tmp_path / "checkpoints" / saved[-1], weights_only=True)
    assert checkpoint["ppo_step"] == 2
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_bad_batches_are_refused(toy, tmp_path):
    with pytest.raises(UserError, match=r"2 prompts cannot be cut into 3 mini-batches"):
        toy.fit(toy.ppo(mini_batches=3), tmp_path, [toy.prompts(rows=2)])
    tokens, mask = toy.prompts(rows=4)
    mask[1] = False
    with pytest.raises(UserError, match="prompt of no tokens"):
        toy.fit(toy.ppo(), tmp_path, [Prompts(tokens, mask)])
    with pytest.raises(UserError, match="context is 32"):
        toy.fit(toy.ppo(sampling={"max_new_tokens": 30}), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"mini_batches": 0},
        {"micro_batch_size": 0},
        {"clip": 0.0},
        {"value_clip": 0.0},
        {"learning_rate": -1.0},
        {"gamma": 1.5},
        {"lam": -0.1},
        {"kl_coefficient": -1.0},
        {"target_kl": 0.0},
        {"max_grad_norm": 0.0},
        {"learning_rate": float("nan")},
        {"kl_penalty": "fixd"},
        {"kl_estimator": "k4"},
        {"schedule": "linaer"},
        {"value_learning_rate": -1.0},
    ],
    ids=json.dumps,
)
def test_bad_options_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        PPOConfig(**options)
