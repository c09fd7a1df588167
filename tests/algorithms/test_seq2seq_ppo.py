"""PPO on encoder-decoders: what holds for causal models holds here."""

import pytest
import torch
from seq2seq_models import KINDS, build

from elastic_lightning import ElasticReset
from elastic_lightning.algorithms import Execution


@pytest.fixture(scope="module", params=KINDS)
def world(request, toy, tmp_path_factory):
    """The toy world with another model in it."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, 30, toy.pad, toy.eos, toy.eos).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(toy.folder).save_pretrained(folder)
    return type(toy)(folder)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"lora": True}, id="lora"),
        pytest.param({"sampling": {"temperature": 0.7, "top_k": 5}}, id="temperature"),
        pytest.param({"separate_value_trunk": True}, id="value trunk"),
        pytest.param({"execution": Execution(gradient_checkpointing=True)}, id="checkpointing"),
        pytest.param({"execution": Execution(rollout_dtype="bfloat16")}, id="bfloat16 rollout, recomputed"),
    ],
)
def test_first_ratio_is_one(world, tmp_path, options):
    module = world.ppo(**options)
    world.perturb(module)
    metrics = world.fit(module, tmp_path, [world.prompts(rows=8)]).callback_metrics
    assert metrics["train/first_ratio_deviation"] < 1e-5
    assert metrics["train/kl"].abs() > 1e-3  # away from the reference
    assert metrics["train/ratio_deviation"] > 1e-3  # the update moves


def test_micro_batches_are_one_batch(world, tmp_path):
    found = []
    for size in (None, 1, 3):
        module = world.ppo(micro_batch_size=size, adam_eps=1e-4)
        world.fit(module, tmp_path, [world.prompts(rows=8)])
        found.append([parameter.detach().clone() for parameter in module.actor.parameters()])
    for other in found[1:]:
        for one, many in zip(found[0], other, strict=True):
            torch.testing.assert_close(many, one, atol=1e-6, rtol=1e-5)


def test_a_resumed_run_is_the_run(world, tmp_path):
    batches = [world.prompts(seed=seed) for seed in range(2)]
    whole, resumed = world.ppo(), world.ppo()
    world.fit(whole, tmp_path, batches, max_epochs=2)
    world.fit(world.ppo(), tmp_path, batches).save_checkpoint(tmp_path / "half.ckpt")
    trainer = world.trainer(tmp_path, max_epochs=2)
    trainer.fit(resumed, world.loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for one, two in zip(whole.actor.parameters(), resumed.actor.parameters(), strict=True):
        assert torch.equal(one, two)


def test_elastic_reset_returns_encoder_and_decoder(world, tmp_path):
    module, callback = world.ppo(), ElasticReset(every=2, decay=0.5, update_on="batch")
    start = {name: parameter.detach().clone() for name, parameter in module.shadowed_parameters().items()}
    assert any("encoder" in name for name in start) and any("decoder" in name for name in start)
    states = []

    def keep(trainer, pl_module):
        states.append({name: parameter.detach().clone() for name, parameter in pl_module.shadowed_parameters().items()})

    module.on_before_reset = keep
    first = world.ppo()
    world.fit(first, tmp_path, [world.prompts(seed=0)])
    world.fit(module, tmp_path, [world.prompts(seed=seed) for seed in range(2)], callbacks=[callback])
    after_one = first.shadowed_parameters()
    for name, parameter in module.shadowed_parameters().items():
        average = 0.5 * (0.5 * start[name] + 0.5 * after_one[name]) + 0.5 * states[0][name]
        torch.testing.assert_close(parameter.detach(), average, atol=1e-6, rtol=0)
        assert torch.equal(callback.ema[name], start[name])


def test_it_learns(world, tmp_path):
    module = world.ppo(learning_rate=1e-2, epochs=2, mini_batches=2, kl_penalty="none", head_noise=0.0)
    rewards = []
    log = module.log_scalars
    module.log_scalars = lambda values: (rewards.append(values.get("train/reward")), log(values))
    world.fit(module, tmp_path, [world.prompts(rows=32, seed=seed) for seed in range(15)])
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2


def test_validation_measures_the_drift(world, tmp_path):
    module = world.ppo()
    trainer = world.trainer(tmp_path)
    loader = world.loader([world.prompts(rows=8)])
    (before,) = trainer.validate(module, loader, verbose=False)
    assert before["val/kl"] == pytest.approx(0, abs=1e-5)
    world.perturb(module)
    (after,) = trainer.validate(module, loader, verbose=False)
    assert after["val/kl"] > 1e-2
