"""What every algorithm that trains a policy against a reward has in common: models, sampling, scoring, validation."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.hyperparameters import check_task
from elastic_lightning.algorithms.memory import keep_memory_of_fit, weights_cast_once
from elastic_lightning.algorithms.policy_metrics import PolicyMetrics
from elastic_lightning.algorithms.policy_weights import PolicyWeights
from elastic_lightning.algorithms.precision import warn_of_emulation, warn_of_lost_updates
from elastic_lightning.algorithms.strategies import check_strategy
from elastic_lightning.checks import check_seed
from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.policies import (
    ActorCritic,
    GraphSampler,
    ModelSource,
    PairedTexts,
    PolicyLM,
    Prompts,
    Responses,
    Rollout,
    RolloutCopy,
    Sampling,
    Texts,
    as_policy,
    counter_uniforms,
    draw_lengths,
    greedy,
    load_source,
    make_reference,
    sample,
)
from elastic_lightning.policies.loading import disable_dropout
from elastic_lightning.policies.portions import Portions
from elastic_lightning.policies.reference import ReferenceKind
from elastic_lightning.ranks import alike, any_rank, mean_of_ranks, rows_of_ranks
from elastic_lightning.rewards import Reward, Scores, reads_special_tokens, score

VALIDATION_LOGITS = 2**24  # of policy and initial policy each that stand in memory at a time
VALIDATION_STEP = -1  # uniforms of validation are those of this step: every validation draws with the same luck


class PolicyModule(PolicyWeights):
    """A policy, its reference theta_0 and a reward; validated on prompts and on human text.

    Validation batches are `Prompts` (sampled from and scored), or human text whose perplexity is measured: [B, L]
    tokens without prompts, or `PairedTexts`. The first validation, before any training, is logged at step 0 when
    Lightning's sanity check runs over all batches (``num_sanity_val_steps: -1``).

    Args:
        policy: the model to train.
        reward: what is maximised.
        sampling: how responses are drawn.
        reference: what drift is measured against; see `elastic_lightning.policies.make_reference`.
        separate_value_trunk: give the value function a transformer of its own.
        execution: what makes a run faster or smaller.
        metrics: further metrics on texts, see `PolicyMetrics`.
        seed: of sampling; the run's ``seed_everything`` by default.
    """

    tasks: tuple[str, ...] = ("prompts",)  # of a data module that serves several

    def __init__(
        self,
        policy: ModelSource,
        reward: Reward,
        sampling: Sampling,
        reference: ReferenceKind,
        separate_value_trunk: bool,
        execution: Execution,
        metrics: list[Metric] | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        check_seed("model's seed", seed)
        loaded = load_source(policy)
        execution.check(policy, loaded.unmerged_adapter)
        disable_dropout(loaded.model)
        self.tokenizer = loaded.tokenizer
        lm = as_policy(loaded.model, execution.trainable_layers, execution.gradient_checkpointing)
        self.drawn_tokens = lm.drawn_tokens(self.tokenizer)
        self.actor = ActorCritic(lm, separate_value_trunk).eval()
        self.reference = make_reference(self.actor.lm, reference, loaded.unmerged_adapter)
        self.initial = self.reference  # what drift is measured against
        self.reward = reward
        if isinstance(reward, Reward):
            reward.bind(lm)
        self.sampling = sampling
        self.execution = execution
        self.portions = Portions(execution.scoring_batch_size, "reading log-probabilities")
        lower = execution.rollout_dtype not in (None, policy.dtype)
        self.rollout_copy = RolloutCopy(lm, getattr(torch, execution.rollout_dtype)) if lower else None
        self._graph_samplers: dict[int, GraphSampler | None] = {}
        if execution.compile:
            lm.compile_update()
        self.policy_metrics = PolicyMetrics(metrics)
        self.sampling_seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self._rows_drawn = 0  # of this evaluation, on all ranks

    # Sampling and scoring ----------------------------------------------------------------------------------------

    def sample(self, prompts: Prompts, step: int, first_row: int = 0, lm: PolicyLM | None = None) -> Rollout:
        """One response a prompt, from `lm` (the policy by default); the draws are a function of (seed, step, global
        row, position)."""
        self.check_context(prompts.tokens.shape[1])
        rows = torch.arange(len(prompts.tokens), device=self.device) + first_row
        uniforms = counter_uniforms(self.sampling_seed, step, rows, self.sampling.max_new_tokens)
        lengths = draw_lengths(self.sampling_seed, step, rows, self.sampling)
        lm = self.actor.lm if lm is None else lm
        how = {"lm": lm, **self.drawn_tokens._asdict()}
        if self._sharded:  # every decode step of a rank gathers each layer from all: they stop together
            return sample(self.actor, prompts, self.sampling, uniforms, lengths=lengths, going_on=any_rank, **how)
        captured = self._graph_sampler(lm, prompts.tokens.shape[1])
        if captured is not None:
            return captured(prompts, uniforms, lengths)
        with weights_cast_once(self.device.type):
            return sample(self.actor, prompts, self.sampling, uniforms, lengths=lengths, **how)

    def _graph_sampler(self, lm: PolicyLM, prompt_tokens: int) -> GraphSampler | None:
        """What decodes by captured steps, where that is asked for and this model can."""
        columns = GraphSampler.capacity(prompt_tokens, self.sampling)
        if self.device.type != "cuda" or not self.execution.cuda_graphs or not lm.takes_static_masks(columns):
            return None
        if id(lm) not in self._graph_samplers:
            how = {"lm": lm, **self.drawn_tokens._asdict()}
            try:
                self._graph_samplers[id(lm)] = GraphSampler(self.actor, self.sampling, **how)
            except UserError as reason:
                rank_zero_info(str(reason))
                self._graph_samplers[id(lm)] = None
        return self._graph_samplers[id(lm)]

    def prompts(self, batch: Any) -> Prompts:
        """The prompts of a batch of the data module: the batch itself, where it holds nothing else."""
        return batch

    def score(self, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
        """Texts of a batch with its responses, and their scores [B], on the module's device."""
        texts = self.actor.lm.decode(self.tokenizer, self.prompts(batch), responses)
        marked = None
        if reads_special_tokens(self.reward):
            decode = self.actor.lm.decode
            marked = decode(self.tokenizer, self.prompts(batch), responses, special_tokens=True)[:2]
        total, components, valid = score(self.reward, texts.prompts, texts.responses, marked)
        on_device = {name: part.to(self.device) for name, part in components.items()}
        return texts, Scores(total.to(self.device), on_device, None if valid is None else valid.to(self.device))

    def rollout(self, prompts: Prompts, step: int, first_row: int = 0) -> Rollout:
        """`sample` for training: with the copy of the weights that `execution.rollout_dtype` asks for."""
        if self.rollout_copy is None:
            return self.sample(prompts, step, first_row)
        self.rollout_copy.refresh(self.actor.lm)
        with torch.autocast(self.device.type, enabled=False):
            return self.sample(prompts, step, first_row, self.rollout_copy.lm)

    def imitation_targets(self, batch: Any) -> Responses:
        """What the policy says to a batch, greedily: what a student will imitate."""
        drawn = self.drawn_tokens._asdict()
        return greedy(self.actor.lm, self.prompts(batch), self.sampling.max_new_tokens, **drawn)

    def imitation_losses(self, batch: Any, targets: Responses) -> Iterator[Tensor]:
        """The loss of a student, nats per token: one optimizer step each."""
        yield self.actor.lm.pair_nll(PairedTexts(self.prompts(batch), targets)) / tokens_of_a_rank(targets)

    def trunk_hidden(self, prompts: Prompts, responses: Responses) -> Tensor | None:
        """What leaves the frozen layers [B, P+T-1, H], where `execution.trainable_layers` froze some."""
        if self.execution.trainable_layers is None:
            return None
        return torch.cat(self._in_portions(lambda *part: self.actor.lm.trunk_hidden(*part[:2]), prompts, responses))

    @torch.no_grad()
    def recompute(self, prompts: Prompts, rollout: Rollout, trunk: Tensor | None = None) -> Rollout:
        """The rollout with log-probabilities and values from a forward pass as the update does it, where
        `execution.recompute_logprobs` wants that; else the same rollout."""
        if not self.execution.recomputes(next(self.actor.lm.parameters()).dtype):
            return rollout
        parts = self._in_portions(
            lambda *part: self.actor.evaluate(*part[:2], self.sampling.temperature, trunk=part[2]),
            prompts,
            rollout.responses,
            trunk,
        )
        logprobs = torch.cat([part.logprobs for part in parts])
        values = torch.cat([part.values for part in parts]).masked_fill(~rollout.mask, 0)
        return rollout._replace(logprobs=logprobs, values=values)

    def reference_logprobs(self, prompts: Prompts, responses: Responses, trunk: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, T] of the responses under theta_0, at the sampling temperature."""
        with torch.inference_mode(not self._sharded):  # what is gathered in inference mode could not be trained
            parts = self._in_portions(
                lambda *part: self.reference.logprobs(*part[:2], self.sampling.temperature, trunk=part[2]),
                prompts,
                responses,
                trunk,
            )
        return torch.cat(parts)  # outside, where what is made may enter a graph

    def _in_portions(
        self,
        function: Callable[[Prompts, Responses, Tensor | None], Any],
        prompts: Prompts,
        responses: Responses,
        trunk: Tensor | None = None,
    ) -> list[Any]:
        """Results of a function of rows of all three, as many at a time as `execution.scoring_batch_size`, or all; half
        as many, and for the rest of the run, where memory does not suffice."""

        def part(rows: slice) -> Any:
            return function(*_rows(rows, prompts, responses), None if trunk is None else trunk[rows])

        return self.portions.run(part, len(prompts.tokens))

    # Validation, test, prediction --------------------------------------------------------------------------------

    def validation_step(
        self, batch: Prompts | PairedTexts | Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]] | None:
        """Measure one batch; returns the rows of `predict_step` for prompts."""
        with self.gathered():
            return self._measure(batch)

    def _measure(self, batch: Prompts | PairedTexts | Tensor) -> list[dict[str, Any]] | None:
        if isinstance(batch, Tensor):
            self.policy_metrics.update_human(-self.actor.lm.next_token_statistics(batch).logprobs)
            return None
        if isinstance(batch, PairedTexts):
            nll = -self.actor.lm.pair_statistics(batch).logprobs
            self.policy_metrics.update_human(nll, batch.target.mask)
            return None
        prompts = self.prompts(batch)
        rollout = self.sample(prompts, VALIDATION_STEP, self._first_row(prompts))
        texts, scores = alike(lambda: self._score_if_finite(batch, rollout.responses))
        scored = scores.total if scores.valid is None else scores.total[scores.valid]
        self.policy_metrics.update_samples(rollout.responses, texts.complete, scored)
        self._measure_drift(prompts, rollout.responses)
        return _as_dicts(texts, scores, self.measure_texts(batch, texts))

    def _score_if_finite(self, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
        """`score`; between training batches a batch whose reward is not finite is left out of what is measured."""
        try:
            texts, scores = self.score(batch, responses)
            if scores.valid is not None and not scores.valid.any():
                raise NotFinite("reward", f"the reward raised on all {len(responses.tokens)} responses")
            return texts, scores
        except NotFinite as fault:
            if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
                raise  # before there is anything to lose
            warnings.warn(f"validation: {len(responses.tokens)} responses have no reward: {fault}", stacklevel=2)
            texts = self.actor.lm.decode(self.tokenizer, self.prompts(batch), responses)
            none = torch.zeros(len(responses.tokens), device=self.device)
            return texts, Scores(none, {}, none.bool())

    def measure_texts(self, batch: Any, texts: Texts) -> dict[str, list[str]]:
        """Measure B sampled texts; further columns of B texts for whoever looks at samples."""
        self.policy_metrics.update_texts(texts)
        return {}

    def _measure_drift(self, prompts: Prompts, sampled: Responses) -> None:
        """KL, entropy and fluency of sampled responses, in parts whose logits fit into memory."""
        whole = sampled.mask.shape[1] * self.actor.lm.vocabulary  # logits a row
        size = max(1, VALIDATION_LOGITS // whole)
        for start in range(0, len(sampled.tokens), size):
            part = _rows(slice(start, start + size), prompts, sampled)
            logits, initial = self.actor.lm.response_logits(*part), self.initial.response_logits(*part)
            self.policy_metrics.update_logits(part[1], logits, initial, self.sampling.temperature)

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
        prompts = self.prompts(batch)
        with self.gathered():
            rollout = self.sample(prompts, VALIDATION_STEP, self._first_row(prompts))
            texts, scores = alike(lambda: self._score_if_finite(batch, rollout.responses))
        return _as_dicts(texts, scores)

    def on_validation_epoch_start(self) -> None:
        self._rows_drawn = 0

    def on_test_epoch_start(self) -> None:
        self._rows_drawn = 0

    def on_predict_epoch_start(self) -> None:
        self._rows_drawn = 0

    def _first_row(self, prompts: Prompts) -> int:
        """Global row of a batch's first prompt. Counted, for the last batch may be smaller than those before."""
        rows = rows_of_ranks(len(prompts.tokens))
        if self._sharded and len(set(rows)) > 1:  # every rank must run every layer equally often
            raise UserError(
                f"a batch of {sum(rows)} prompts over {len(rows)} processes: where weights are sharded the number of "
                "prompts (data's eval_prompts) must be a multiple of the processes"
            )
        first = self._rows_drawn + sum(rows[: self.global_rank])
        self._rows_drawn += sum(rows)
        return first

    # Logging on the ppo_step axis --------------------------------------------------------------------------------

    @rank_zero_only
    def log_scalars(self, values: dict[str, float]) -> None:
        """Log at x = ppo_step. Lightning's own axis counts optimizer steps, or batches from 0."""
        for logger in self.loggers:
            logger.log_metrics(values, step=self.ppo_step)

    # Checks ------------------------------------------------------------------------------------------------------

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

    def teardown(self, stage: str) -> None:
        self._graph_samplers.clear()  # Lightning moves the weights from here on, and graphs hold their addresses

    def check_context(self, prompt_tokens: int) -> None:
        """Raise a `UserError` when prompts and responses do not fit the model's positions."""
        self.actor.lm.check_context(prompt_tokens, self.sampling.max_new_tokens)


def tokens_of_a_rank(targets: Responses) -> float:
    """Valid tokens of B texts, a mean over ranks: with a loss that is divided by it, a token weighs the same on all,
    where gradients are averaged over ranks."""
    return mean_of_ranks(float(targets.mask.sum()))


def _rows(rows: slice, prompts: Prompts, responses: Responses) -> tuple[Prompts, Responses]:
    return Prompts(*(tensor[rows] for tensor in prompts)), Responses(*(tensor[rows] for tensor in responses))


def _as_dicts(texts: Texts, scores: Scores, columns: dict[str, list[str]] | None = None) -> list[dict[str, Any]]:
    """One dict of plain values a response; `columns` are further ones. A response that is masked has no reward."""
    valid = [True] * len(scores.total) if scores.valid is None else scores.valid.tolist()
    values = [value if kept else None for value, kept in zip(scores.total.tolist(), valid, strict=True)]
    return [
        {
            "prompt": texts.prompts[row],
            "response": texts.responses[row],
            "complete": texts.complete[row],
            "reward": values[row],
            **{f"reward_{name}": part[row].item() for name, part in scores.components.items()},
            **{name: column[row] for name, column in (columns or {}).items()},
        }
        for row in range(len(texts.prompts))
    ]
