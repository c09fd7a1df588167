"""Batches that are not finite: named, counted, skipped up to a limit, never stepped and never averaged."""

import math

import pytest
import torch

from elastic_lightning.algorithms import PPOConfig
from elastic_lightning.algorithms.faults import Faults, check_finite
from elastic_lightning.callbacks import BatchCheckpoint, ElasticReset
from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.rewards import FunctionReward, Reward


class FailsAt(Reward):
    """A constant per response, but on these calls (from 0) one NaN."""

    def __init__(self, *calls, bad=math.nan):
        super().__init__()
        self.calls, self.bad, self.seen = set(calls), bad, -1

    def forward(self, prompts, responses):
        self.seen += 1
        scores = torch.arange(len(responses)).float()
        if self.seen in self.calls:
            scores[1] = self.bad
        return scores


class Poisoned:
    """Makes the gradient of given (batch, optimizer step) pairs infinite after the backward pass; loss stays finite."""

    def __init__(self, module, *where):
        self.module, self.where, self.step = module, set(where), {}
        backward = module.manual_backward

        def poisoned(loss):
            backward(loss)
            batch = module.ppo_step
            step = self.step[batch] = self.step.get(batch, -1) + 1
            if (batch, step) in self.where:
                next(module.actor.lm.parameters()).grad[0] = math.inf

        module.manual_backward = poisoned


def batches(toy, count):
    return [toy.prompts(rows=6, seed=seed) for seed in range(count)]


def state(module):
    return {name: parameter.detach().clone() for name, parameter in module.actor.named_parameters()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Snapshots(ElasticReset):
    """Keeps the average and the online weights after every batch."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        clone = {name: tensor.clone() for name, tensor in self.ema.items()}
        self.__dict__.setdefault("taken", []).append((clone, state(pl_module), self.updates, self.batches))


@pytest.mark.parametrize("update_on", ["optimizer_step", "batch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_reward_leaves_weights_optimizer_and_average_alone(toy, tmp_path, update_on, bad):
    module, average = toy.ppo(reward=FailsAt(1, bad=bad)), Snapshots(every=100, update_on=update_on)
    with pytest.warns(UserWarning, match="PPO batch 2 is skipped, its reward is not finite.*FailsAt"):
        trainer = toy.fit(module, tmp_path, batches(toy, 3), callbacks=[average])
    (ema1, online1, *counts1), (ema2, online2, *counts2), (ema3, online3, *counts3) = average.taken
    assert same(ema1, ema2) and same(online1, online2)
    assert not same(ema2, ema3) and not same(online2, online3)
    steps = 4 if update_on == "optimizer_step" else 1
    assert [counts1, counts2, counts3] == [[steps, 1], [steps, 2], [2 * steps, 3]]  # updates; batches go on
    assert module.ppo_step == 3 and trainer.global_step == 8
    assert module.faults.skipped == {"reward": 1}


def test_the_schedule_and_the_draws_go_on_and_the_kl_controller_does_not(toy, tmp_path):
    options = {"schedule": "linear", "kl_penalty": "adaptive", "kl_horizon": 100}
    whole, holed = toy.ppo(reward=FailsAt(), **options), toy.ppo(reward=FailsAt(0), **options)
    with pytest.warns(UserWarning, match="PPO batch 1 is skipped"):
        trainer = toy.fit(holed, tmp_path, batches(toy, 2))
    other = toy.fit(whole, tmp_path, batches(toy, 2))
    rates = [t.optimizers[0].param_groups[0]["lr"] for t in (trainer, other)]
    assert rates[0] == rates[1]
    assert torch.equal(holed.seen[0].prompts.tokens, toy.prompts(rows=6, seed=1).tokens)
    coefficient = holed.config.kl_coefficient
    assert holed.kl_controller.coefficient != whole.kl_controller.coefficient
    # One move of at most a fifth times 6 / 100, for one batch of 6.
    assert holed.kl_controller.coefficient == pytest.approx(coefficient * (1 - 0.2 * 6 / 100))


@pytest.mark.parametrize("update_on", ["optimizer_step", "batch"])
def test_an_infinite_gradient_is_not_stepped_and_the_steps_before_it_stay(toy, tmp_path, update_on):
    module, average = toy.ppo(), Snapshots(every=100, update_on=update_on)
    Poisoned(module, (1, 0), (2, 2))
    with pytest.warns(UserWarning, match="its gradient is not finite: gradient norm inf"):
        trainer = toy.fit(module, tmp_path, batches(toy, 3), callbacks=[average])
    (ema1, online1, *_), (ema2, online2, *_), (ema3, online3, *counts) = average.taken
    assert same(ema1, ema2) and same(online1, online2)
    assert trainer.global_step == 4 + 0 + 2
    assert not same(online2, online3)
    assert all(torch.isfinite(weight).all() for weight in online3.values())
    assert counts == [4 + 2 if update_on == "optimizer_step" else 1, 3]
    assert same(ema2, ema3) == (update_on == "batch")
    assert module.faults.skipped == {"gradient": 2}


def test_a_loss_that_is_not_finite_is_named(toy, tmp_path):
    module = toy.ppo(max_skipped=0)
    with torch.no_grad():
        next(module.actor.value_head.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match=r"batch 1 is skipped, its loss is not finite: .*value_loss nan.*max_skipped"):
        toy.fit(module, tmp_path)
    assert module.faults.skipped == {"loss": 1}


def test_a_policy_of_nan_stops_with_a_line(toy, tmp_path):
    module = toy.ppo(max_skipped=1)
    with torch.no_grad():
        for parameter in module.actor.lm.parameters():
            parameter.fill_(math.nan)
    with pytest.warns(UserWarning, match="its loss"), pytest.raises(UserError, match=r"loss 2; ppo.max_skipped is 1"):
        toy.fit(module, tmp_path, batches(toy, 4))


@pytest.mark.parametrize(("limit", "done"), [(0, 1), (1, 3), (2, 5)])
def test_the_run_stops_at_one_more_than_the_limit(toy, tmp_path, limit, done):
    module = toy.ppo(reward=FailsAt(0, 2, 4), max_skipped=limit)
    with pytest.raises(UserError, match=rf"PPO batch {done} .*reward {limit + 1}; ppo.max_skipped is {limit}"):
        toy.fit(module, tmp_path, batches(toy, 6))
    assert module.ppo_step == done


def test_counts_are_logged_and_survive_a_checkpoint(toy, tmp_path, read_events):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    module = toy.ppo(reward=FailsAt(1), max_skipped=1)
    with pytest.warns(UserWarning, match="skipped"):
        toy.fit(
            module,
            tmp_path,
            batches(toy, 4),
            logger=logger,
            callbacks=[BatchCheckpoint(every=2)],
            enable_checkpointing=True,
        )
    curves = read_events(logger.log_dir)
    assert curves["fault/reward"] == [(2, 1.0)]
    assert [step for step, _ in curves["train/reward"]] == [1, 3, 4]
    resumed = toy.ppo(reward=FailsAt(0), max_skipped=1)
    trainer = toy.trainer(tmp_path, max_epochs=2)
    path = tmp_path / "run" / "checkpoints" / "batch_000002.ckpt"
    with pytest.raises(UserError, match=r"reward 2; ppo.max_skipped is 1"):
        trainer.fit(resumed, toy.loader(batches(toy, 4)), ckpt_path=path)


def test_after_a_reset_the_first_batch_that_taught_something_is_watched(toy, tmp_path, read_events):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    with pytest.warns(UserWarning, match="PPO batch 3"):
        toy.fit(toy.ppo(reward=FailsAt(2)), tmp_path, batches(toy, 4), logger=logger, callbacks=[ElasticReset(every=2)])
    assert [step for step, _ in read_events(logger.log_dir)["reset/reward_after"]] == [4]


# Responses on which the reward raises ---------------------------------------------------------------------------------


def masking(*rows, **options):
    """A reward that raises on these of a batch's prompts, and a count of its calls."""

    def count(prompts, responses):
        count.calls += 1
        bad = {PROMPT_TEXTS[row] for row in rows}
        if bad & set(prompts):
            raise KeyError("stars")
        return [float(len(response.split())) for response in responses]

    count.calls = 0
    return FunctionReward(count, **options)


PROMPT_TEXTS: list[str] = []


@pytest.fixture(autouse=True)
def prompt_texts(toy):
    PROMPT_TEXTS[:] = [
        " ".join(f"w{token}" if token < 27 else "" for token in row[keep].tolist()).strip()
        for row, keep in zip(*toy.prompts(rows=6, seed=0), strict=True)
    ]


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_masked_response_teaches_nothing(toy, tmp_path, micro_batch_size):
    """The oracle is the same batch in which the masked rows' tokens are others: nothing may change."""
    options = {"mini_batches": 1, "micro_batch_size": micro_batch_size, "kl_penalty": "none"}
    ends = []
    for changed in (False, True):
        module = toy.ppo(reward=masking(1, 4, on_error="mask"), **options)
        if changed:
            _change_rows(module, [1, 4])
        with pytest.warns(UserWarning, match="KeyError on single responses, which are masked"):
            trainer = toy.fit(module, tmp_path, [toy.prompts(rows=6, seed=0)])
        ends.append(state(module))
        rollout = module.seen[0].rollout
        assert rollout.mask.any(dim=1).tolist() == [True, False, True, True, False, True]
        assert module.faults.masked == 2
        words = [len([t for t in row[keep] if t < 27]) for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]
        assert trainer.callback_metrics["train/reward"] == pytest.approx(sum(words) / 4)
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], atol=1e-7, rtol=0)


def _change_rows(module, rows):
    sample = module.rollout

    def rollout(*args):
        drawn = sample(*args)
        tokens = drawn.tokens.clone()
        tokens[rows] = torch.where(drawn.mask[rows], (tokens[rows] + 1) % 27, tokens[rows])
        return drawn._replace(tokens=tokens)

    module.rollout = rollout


def test_a_batch_without_any_score_is_skipped(toy, tmp_path):
    module = toy.ppo(reward=masking(*range(6), on_error="mask"))
    with pytest.warns(UserWarning, match="its reward is not finite: it raised on all 6"):
        toy.fit(module, tmp_path, [toy.prompts(rows=6, seed=0)])
    assert module.faults.skipped == {"reward": 1} and module.ppo_step == 1


def test_a_mini_batch_without_any_score_is_passed_over(toy, tmp_path):
    """One row a mini-batch: the five that have a score are trained on, and nothing is NaN."""
    module = toy.ppo(reward=masking(3, on_error="mask"), epochs=2, mini_batches=6, max_skipped=0)
    with pytest.warns(UserWarning, match="which are masked"):
        trainer = toy.fit(module, tmp_path, [toy.prompts(rows=6, seed=0)])
    assert trainer.callback_metrics["train/optimizer_steps"] == 10 and not module.faults.skipped
    assert all(value.isfinite() for name, value in trainer.callback_metrics.items() if "loss" in name)


def test_a_validation_goes_on_without_rewards_that_are_not_finite(toy, tmp_path):
    class Sometimes(Reward):
        def forward(self, prompts, responses):
            scores = torch.tensor([float(len(response.split())) for response in responses])
            return scores.where(torch.tensor(len(prompts) != 5), math.nan)

    module, trainer = toy.ppo(reward=Sometimes()), toy.trainer(tmp_path)
    validation = toy.loader([toy.prompts(rows=5), toy.prompts(rows=6, seed=1)])
    with pytest.raises(UserError, match="returned nan"):
        trainer.validate(module, validation, verbose=False)
    with pytest.warns(UserWarning, match="validation: 5 responses have no reward"):
        trainer.fit(module, toy.loader([toy.prompts(rows=6)]), validation)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert math.isfinite(found["val/reward"]) and math.isfinite(found["val/kl"])


def test_by_default_the_run_stops(toy, tmp_path):
    with pytest.raises(UserError, match=r"KeyError.*stars"):
        toy.fit(toy.ppo(reward=masking(3)), tmp_path, [toy.prompts(rows=6, seed=0)])


# The ratio ------------------------------------------------------------------------------------------------------------


def test_an_exploding_ratio_is_told_once(toy, tmp_path, recwarn):
    module = toy.ppo(learning_rate=0.3, max_grad_norm=None, max_skipped=100)
    toy.fit(module, tmp_path, batches(toy, 4))
    told = [str(warning.message) for warning in recwarn if "policy ratio explodes" in str(warning.message)]
    assert len(told) == 1 and "learning rate" in told[0]


def test_an_ordinary_ratio_is_not_told(toy, tmp_path, recwarn):
    toy.fit(toy.ppo(), tmp_path, batches(toy, 2))
    assert not [warning for warning in recwarn if "explodes" in str(warning.message)]


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_finite_names_what_is_not(bad):
    fine, ratio = torch.tensor(1.0), torch.tensor(3.0)
    check_finite({"policy_loss": fine, "value_loss": fine}, fine, ratio)
    with pytest.raises(NotFinite, match=rf"^value_loss {bad}, gradient norm {bad}, where the mean.* is 3$") as error:
        check_finite({"policy_loss": fine, "value_loss": torch.tensor(bad)}, torch.tensor(bad), ratio)
    assert error.value.what == "loss"
    with pytest.raises(NotFinite, match=r"^gradient norm") as error:
        check_finite({"policy_loss": fine}, torch.tensor(bad), ratio)
    assert error.value.what == "gradient"
    check_finite({"policy_loss": fine}, None, ratio)


def test_the_state_of_the_counts_comes_back():
    faults, other = Faults(), Faults()
    with pytest.warns(UserWarning, match="PPO batch 7"):
        faults.skip(NotFinite("loss", "policy_loss nan"), 7, limit=1)
    faults.masked = 3
    other.load_state_dict(faults.state_dict())
    assert other.scalars() == faults.scalars() == {"fault/loss": 1.0, "fault/masked": 3.0}
    assert Faults().scalars() == {}


def test_a_negative_limit_is_refused():
    with pytest.raises(UserError, match=r"ppo.max_skipped must be 0 or more"):
        PPOConfig(max_skipped=-1)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_out_of_memory_in_the_reference_halves_its_rows_for_good(toy, tmp_path):
    """Rows at a time do not matter to the result: the oracle is the run that has memory enough."""
    plain, small = toy.ppo(), toy.ppo()
    toy.fit(plain, tmp_path, batches(toy, 2))
    sizes, logprobs = [], small.reference.logprobs

    def limited(prompts, *args, **kwargs):
        sizes.append(len(prompts.tokens))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return logprobs(prompts, *args, **kwargs)

    small.reference.logprobs = limited
    with pytest.warns(UserWarning, match="out of memory in reading log-probabilities: 1 rows at a time"):
        toy.fit(small, tmp_path, batches(toy, 2))
    assert sizes == [6, 3] + 12 * [1]
    for name, weight in state(plain).items():
        torch.testing.assert_close(state(small)[name], weight, atol=1e-6, rtol=0)
