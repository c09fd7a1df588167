"""What every algorithm that trains a policy against a reward has in common: models, sampling, scoring, validation."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.faults import Faults
from elastic_lightning.algorithms.hyperparameters import check_task, from_plain, save_plain_hyperparameters
from elastic_lightning.algorithms.memory import keep_memory_of_fit
from elastic_lightning.algorithms.optimization import adamw, clip_gradient, gradient_norm, policy_groups
from elastic_lightning.algorithms.policy_checkpoint import frozen_fingerprints, keep_state, take_state
from elastic_lightning.algorithms.policy_metrics import PolicyMetrics
from elastic_lightning.algorithms.policy_validation import as_dicts, draw_and_score, measure
from elastic_lightning.algorithms.ppo.config import PPOConfig
from elastic_lightning.algorithms.ppo.experience import Experience
from elastic_lightning.algorithms.ppo.metrics import batch_statistics, ratio_deviation, speed
from elastic_lightning.algorithms.ppo.rollout import ScoredRollout, check_rows
from elastic_lightning.algorithms.precision import warn_of_emulation, warn_of_lost_updates
from elastic_lightning.algorithms.schedules import check_end
from elastic_lightning.algorithms.shards import Shards
from elastic_lightning.algorithms.strategies import check_strategy
from elastic_lightning.checks import check_seed
from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.policies import (
    ActorCritic,
    ModelSource,
    PairedTexts,
    Prompts,
    Responses,
    Rollout,
    RolloutCopy,
    Sampler,
    Sampling,
    Texts,
    as_policy,
    greedy,
    load_source,
    make_reference,
)
from elastic_lightning.policies.loading import disable_dropout
from elastic_lightning.policies.portions import Portions
from elastic_lightning.policies.reference import FrozenCopy, ReferenceKind
from elastic_lightning.policies.saving import save_model, save_value_head
from elastic_lightning.policies.sharding import full
from elastic_lightning.ranks import alike, mean_of_ranks, rows_of_ranks
from elastic_lightning.rewards import Reward, Scores, reads_special_tokens, score

FIRST_RATIO_TOLERANCE = 0.05


class PolicyModule(LightningModule):
    """A policy, its reference theta_0 and a reward, trained in manual optimization; validated on prompts and on text.

    Its clock is `ppo_step`: batches finished. A subclass writes `training_step`, out of the steps that are here.

    Validation batches are `Prompts` (sampled from and scored), or human text whose perplexity is measured: [B, L]
    tokens without prompts, or `PairedTexts`. The first validation, before any training, is logged at step 0 when
    Lightning's sanity check runs over all batches (``num_sanity_val_steps: -1``).
    """

    tasks: tuple[str, ...] = ("prompts",)  # of a data module that serves several
    trained_modules: tuple[str, ...] = ("actor",)  # what a checkpoint keeps the trained weights of

    def __init__(
        self,
        policy: ModelSource,
        reward: Reward,
        ppo: PPOConfig = PPOConfig(),  # noqa: B008 (frozen)
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        reference: ReferenceKind = "auto",
        separate_value_trunk: bool = False,
        execution: Execution = Execution(),  # noqa: B008 (frozen)
        metrics: list[Metric] | None = None,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            policy: the model to train.
            reward: what is maximised.
            ppo: the options of the algorithm.
            sampling: how responses are drawn.
            reference: what drift is measured against: adapter_off (LoRA), frozen_copy, or auto.
            separate_value_trunk: give the value function a transformer of its own.
            execution: what makes a run faster or smaller.
            metrics: further metrics on sampled texts, logged at validation.
            seed: of sampling; the run's seed_everything by default.
        """
        super().__init__()
        policy, ppo = from_plain(ModelSource, policy), from_plain(PPOConfig, ppo)
        sampling, execution = from_plain(Sampling, sampling), from_plain(Execution, execution)
        check_seed("model's seed", seed)
        check_options(policy, ppo, sampling, separate_value_trunk)
        save_plain_hyperparameters(self, ignore=["reward", "metrics"])
        self.automatic_optimization = False
        self.config, self.sampling, self.execution, self.reward = ppo, sampling, execution, reward
        self.sampling_seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed

        loaded = load_source(policy)
        execution.check(policy, loaded.unmerged_adapter)
        disable_dropout(loaded.model)
        self.tokenizer = loaded.tokenizer
        lm = as_policy(loaded.model, execution.trainable_layers, execution.gradient_checkpointing)
        self.actor = ActorCritic(lm, separate_value_trunk, ppo.has_critic).eval()
        self.reference = make_reference(lm, reference, loaded.unmerged_adapter)
        self.initial = self.reference  # what drift is measured against
        if isinstance(reward, Reward):
            reward.bind(lm)
        self.drawn_tokens = lm.drawn_tokens(self.tokenizer)
        self.sample = Sampler(self.actor, sampling, self.drawn_tokens, self.sampling_seed, execution.cuda_graphs)
        lower = execution.rollout_dtype not in (None, policy.dtype)
        self.rollout_copy = RolloutCopy(lm, getattr(torch, execution.rollout_dtype)) if lower else None
        self.portions = Portions(execution.scoring_batch_size, "reading log-probabilities")
        if execution.compile:
            lm.compile_update()

        self.ppo_step = 0  # batches finished
        self.shards = Shards()
        self.strict_loading = False  # frozen weights stay out of checkpoints; on_load_checkpoint checks the rest
        self._fingerprints: dict[str, str] | None = None
        self.kl_controller = ppo.kl_controller()
        self.faults = Faults()
        self.batch_skipped = False  # the last training batch taught nothing: weight callbacks leave it out
        self.seconds: dict[str, float] = {}
        self.grad_norm = torch.tensor(0.0)
        self.policy_metrics = PolicyMetrics(metrics)
        self.rows_drawn = 0  # of this evaluation, on all ranks

    # The steps of a training batch -------------------------------------------------------------------------------

    @contextmanager
    def ppo_batch(self) -> Iterator[None]:
        """One training batch. One whose reward, loss or gradient is not finite is given up, on all ranks alike: steps
        taken before the fault stay, the clock and the schedule go on, the KL controller does not move, and weight
        callbacks leave the batch out of their average.

        Raises:
            UserError: more than ppo.max_skipped batches.
        """
        self.batch_skipped = False
        try:
            yield
        except NotFinite as fault:
            self.optimizers().zero_grad()
            self.batch_skipped = True
            self.ppo_step += 1
            self.faults.skip(fault, self.ppo_step, self.config.max_skipped)
            self.log_scalars(self.faults.scalars())
        # After the log, which shows the rate that this batch was trained with.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")  # skipped before the first optimizer step
            self.lr_schedulers().step()

    def check_prompts(self, prompts: Prompts) -> int:
        """The global row of the first prompt. Raises a `UserError`, on all ranks alike, for prompts that cannot be
        learned from."""
        rows = rows_of_ranks(len(prompts.tokens))

        def check() -> None:
            config, sharded = self.config, bool(self.shards)
            check_rows(rows, self.global_rank, config.mini_batches, config.micro_batch_size, sharded)
            self.check_context(prompts.tokens.shape[1])
            if not prompts.mask.any(dim=1).all():
                raise UserError("a prompt of no tokens: a policy needs one at least; drop empty prompts from the data")

        alike(check)
        return sum(rows[: self.global_rank])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A phase of a training batch: its seconds, and a sharded policy's weights brought together, but to update."""
        with nullcontext() if name == "update" else self.shards.gathered():
            synchronize(self.device)
            start = time.perf_counter()
            yield
            synchronize(self.device)
            self.seconds[name] = time.perf_counter() - start

    def rollout(self, prompts: Prompts, first_row: int = 0) -> Rollout:
        """`sample` for training: with the copy of the weights that `execution.rollout_dtype` asks for."""
        if self.rollout_copy is None:
            return self.sample(prompts, self.ppo_step, first_row)
        self.rollout_copy.refresh(self.actor.lm)
        with torch.autocast(self.device.type, enabled=False):
            return self.sample(prompts, self.ppo_step, first_row, self.rollout_copy.lm)

    def score(self, prompts: Prompts, responses: Responses) -> tuple[Texts, Scores]:
        """Texts of prompts and responses, and their scores [B], on the module's device."""
        decode, marked = self.actor.lm.decode, None
        texts = decode(self.tokenizer, prompts, responses)
        if reads_special_tokens(self.reward):
            marked = decode(self.tokenizer, prompts, responses, special_tokens=True)[:2]
        return texts, score(self.reward, texts.prompts, texts.responses, marked).to(self.device)

    def frozen_hidden(self, prompts: Prompts, responses: Responses) -> Tensor | None:
        """What leaves the frozen layers [B, P+T-1, H], where `execution.trainable_layers` froze some."""
        if self.execution.trainable_layers is None:
            return None
        return torch.cat(self.portions.over(self.actor.lm.trunk_hidden, prompts, responses))

    @torch.no_grad()
    def recompute(
        self, prompts: Prompts, rollout: Rollout, frozen_hidden: Tensor | None = None
    ) -> tuple[Rollout, Tensor | None]:
        """The rollout with log-probabilities and values from a forward pass as the update does it, where
        `execution.recompute_logprobs` wants that, and the largest distance of their ratio from 1; else the same."""
        if not self.execution.recomputes(next(self.actor.lm.parameters()).dtype):
            return rollout, None
        inputs, temperature = (prompts, rollout.responses, frozen_hidden), self.sampling.temperature
        parts = self.portions.over(lambda *rows: self.actor.evaluate(*rows[:2], temperature, rows[2]), *inputs)
        logprobs, values = torch.cat([part.logprobs for part in parts]), None
        if rollout.values is not None:
            values = torch.cat([part.values for part in parts]).masked_fill(~rollout.mask, 0)
        deviation = ratio_deviation(logprobs - rollout.logprobs, rollout.mask)
        return rollout._replace(logprobs=logprobs, values=values), deviation

    def reference_logprobs(self, prompts: Prompts, responses: Responses, frozen_hidden: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, T] of the responses under the reference, at the sampling temperature."""
        inputs, temperature = (prompts, responses, frozen_hidden), self.sampling.temperature
        with torch.inference_mode(not self.shards):  # what is gathered in inference mode could not be trained
            parts = self.portions.over(lambda *rows: self.reference.logprobs(*rows[:2], temperature, rows[2]), *inputs)
        return torch.cat(parts)  # outside, where what is made may enter a graph

    def log_ppo_batch(self, scored: ScoredRollout, experience: Experience, losses: dict[str, float]) -> None:
        """Log everything of one PPO batch, that of all ranks, at its ppo_step, and move the KL controller."""
        if losses["first_ratio_deviation"] > FIRST_RATIO_TOLERANCE and self.ppo_step == 0:
            rank_zero_warn(
                f"the policy ratio deviates by {losses['first_ratio_deviation']:.3g} from 1 on the first mini-batch: "
                "the policy that is updated is not the one that sampled. Likely causes: low precision (compare "
                "trainer.precision: 32-true; execution.recompute_logprobs: always makes the ratio exact for one more "
                "forward pass), a model that ignores position ids or padding"
            )
        if scored.deviation is not None:
            losses["rollout_ratio_deviation"] = scored.deviation.item()
        self.ppo_step += 1
        counts, measured = batch_statistics(scored, experience, self.drawn_tokens.eos_token_id, self.device)
        values = measured | {
            "kl_coefficient": self.kl_controller.coefficient,
            "learning_rate": self.optimizers().param_groups[0]["lr"],
            **losses,
        }
        self.kl_controller.update(measured["kl"], counts.rows)
        self.faults.masked += counts.left_out
        values = {f"train/{name}": value for name, value in values.items()} | speed(self.seconds, counts)
        self.log_scalars(values | (self.faults.scalars() if counts.left_out else {}))
        self.log_dict(values, logger=False)

    @rank_zero_only
    def log_scalars(self, values: dict[str, float]) -> None:
        """Log at x = ppo_step. Lightning's own axis counts optimizer steps, or batches from 0."""
        for logger in self.loggers:
            logger.log_metrics(values, step=self.ppo_step)

    # Optimizer --------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as groups for the optimizer, each with its learning rate and name."""
        return policy_groups(self.actor, self.config)

    def configure_optimizers(self) -> dict[str, Any]:
        return adamw(self.parameter_groups(), self.config, self.trainer, self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, and not before `step`, because a gradient scaler unscales on the way.
        if self.has_gradient_scaler:
            self.grad_norm = gradient_norm(optimizer)
        clip_gradient(optimizer, self.grad_norm, self.config.max_grad_norm)

    @property
    def has_gradient_scaler(self) -> bool:
        """Whether one stands before the optimizer; it looks for infinite gradients, and expects some."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def no_gradient_sync(self) -> AbstractContextManager:
        """Within this context a backward pass is not followed by a sum over ranks."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if block is not None else nullcontext()

    # Imitation, for iterated learning -----------------------------------------------------------------------------

    def imitation_targets(self, batch: Any) -> Responses:
        """What the policy says to a batch, greedily: what a student will imitate."""
        drawn = self.drawn_tokens._asdict()
        return greedy(self.actor.lm, self.prompts(batch), self.sampling.max_new_tokens, **drawn)

    def imitation_losses(self, batch: Any, targets: Responses) -> Iterator[Tensor]:
        """The loss of a student, nats per token: one optimizer step each."""
        yield self.actor.lm.pair_nll(PairedTexts(self.prompts(batch), targets)) / tokens_of_a_rank(targets)

    # Validation, test, prediction --------------------------------------------------------------------------------

    def prompts(self, batch: Any) -> Prompts:
        """The prompts of a batch of the data module: the batch itself, where it holds nothing else."""
        return batch

    def score_batch(self, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
        """`score` of the responses to a batch."""
        return self.score(self.prompts(batch), responses)

    def measure_texts(self, batch: Any, texts: Texts) -> dict[str, list[str]]:
        """Measure B sampled texts; further columns of B texts for whoever looks at samples."""
        self.policy_metrics.update_texts(texts)
        return {}

    def validation_step(
        self, batch: Prompts | PairedTexts | Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]] | None:
        """Measure one batch; returns the rows of `predict_step` for prompts."""
        with self.shards.gathered():
            return measure(self, batch)

    def on_validation_epoch_end(self) -> None:
        values = {f"val/{name}": value for name, value in self.policy_metrics.compute_and_reset().items()}
        if self.trainer.state.fn != "fit":
            self.log_dict(values, sync_dist=True)  # the same on all ranks; else Lightning warns
            return
        if self.trainer.sanity_checking and self.trainer.num_sanity_val_steps != float("inf"):
            return  # a look at the first batches is no measurement
        self.log_scalars(values)
        if not self.trainer.sanity_checking:
            # Not for the logger, whose axis is ours: for the progress bar, ModelCheckpoint and SavePretrained.
            self.log_dict(values, logger=False, sync_dist=True)

    def test_step(self, batch: Prompts | PairedTexts | Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        values = self.policy_metrics.compute_and_reset()
        if self.ppo_step == 0:  # the policy loaded is its own reference, and a KL of 0 would look like no drift
            values.pop("kl", None)
        self.log_dict({f"test/{name}": value for name, value in values.items()}, sync_dist=True)

    def predict_step(self, batch: Prompts, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Prompt, response, reward and its components of each row, as plain values."""
        with self.shards.gathered():
            _, texts, scores = draw_and_score(self, batch)
        return as_dicts(texts, scores)

    def on_validation_epoch_start(self) -> None:
        self.rows_drawn = 0

    def on_test_epoch_start(self) -> None:
        self.rows_drawn = 0

    def on_predict_epoch_start(self) -> None:
        self.rows_drawn = 0

    # Checks and checkpoints ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        check_task(self.trainer, *self.tasks)
        keep_memory_of_fit(self.trainer, stage)
        warn_of_emulation(self, self.trainer)
        moved = any(getattr(callback, "moves_reference", False) for callback in self.trainer.callbacks)
        if moved and self.initial is self.reference:  # once: a later fit or validate finds the reference moved
            self.initial = copy.deepcopy(self.reference)  # the penalty's anchor moves; drift is still from theta_0
        longest = getattr(getattr(self.trainer, "datamodule", None), "max_prompt_tokens", None)
        if longest is not None:
            self.check_context(longest)

    def on_fit_start(self) -> None:
        warn_of_lost_updates(self, self.trainer)
        check_end(self.trainer, "ppo.schedule", self.config.schedule)

    def on_train_start(self) -> None:
        check_end(self.trainer, "ppo.schedule", self.config.schedule, self.trainer.num_training_batches)

    def teardown(self, stage: str) -> None:
        self.sample.clear()  # Lightning moves the weights from here on

    def check_context(self, prompt_tokens: int) -> None:
        """Raise a `UserError` when prompts and responses do not fit the model's positions."""
        self.actor.lm.check_context(prompt_tokens, self.sampling.max_new_tokens)

    # Weights ----------------------------------------------------------------------------------------------------

    def shadowed_parameters(self) -> dict[str, Tensor]:
        """The weights that Elastic Reset averages and resets: the policy's trainable ones, not the value function's."""
        return {name: weight for name, weight in self.actor.lm.named_parameters() if weight.requires_grad}

    def reference_weights(self) -> dict[str, Tensor] | None:
        """The reference's weights by the names of `shadowed_parameters`, where it is a copy: theta_0, until moved."""
        if not isinstance(self.reference, FrozenCopy):
            return None
        weights = self.reference.weights()
        return {name: weights[name] for name in PolicyModule.shadowed_parameters(self)}

    def save_pretrained(self, folder: str | Path, adapter: str = "merged") -> None:
        """Write a folder that transformers loads: policy and tokenizer, and the value head in a file of its own."""
        first = self.global_rank == 0
        model = self.shards.whole_policy(self.actor.lm.model, keep=first)  # every rank holds a part
        head = {} if self.actor.value_head is None else self.actor.value_head.state_dict()
        head = {name: full(tensor.detach()) for name, tensor in head.items()}
        if model is not None:
            save_model(model, self.tokenizer, folder, adapter)
            save_value_head(head, Path(folder))

    def configure_model(self) -> None:
        if self.device_mesh is not None and not self.shards:
            self.shards.make(self)

    def fingerprints(self) -> dict[str, str]:
        """Of the weights that checkpoints leave out, by the module's part; taken once, for they do not change."""
        if self._fingerprints is None:
            self._fingerprints = frozen_fingerprints(self)
        return self._fingerprints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        take_state(self, checkpoint)


def check_options(policy: ModelSource, ppo: PPOConfig, sampling: Sampling, separate_value_trunk: bool) -> None:
    """Raise a `UserError` for options that exclude each other; warn of those that are not used."""
    if ppo.missing_eos_penalty and not sampling.eos:
        raise UserError("ppo.missing_eos_penalty needs sampling.eos: without an end every response would pay it")
    if separate_value_trunk and not ppo.has_critic:
        raise UserError(
            f"separate_value_trunk and ppo.advantage: {ppo.advantage} exclude each other: it learns no values"
        )
    if policy.lora is not None and policy.lora.dropout > 0:
        rank_zero_warn("lora.dropout is 0 in reinforcement learning: the value given is not used")


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_of_a_rank(targets: Responses) -> float:
    """Valid tokens of B texts, a mean over ranks: with a loss that is divided by it, a token weighs the same on all,
    where gradients are averaged over ranks."""
    return mean_of_ranks(float(targets.mask.sum()))
