"""Step 6: epochs of mini-batches over one PPO batch, each mini-batch one optimizer step.

A mini-batch is the same on any number of ranks, and its gradient that of one forward pass over all its rows, into
however many micro-batches it is cut: losses are weighed by their share of its tokens, on all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from elastic_lightning.algorithms.faults import check_finite
from elastic_lightning.algorithms.optimization import gradient_norm
from elastic_lightning.algorithms.ppo.config import PPOConfig
from elastic_lightning.algorithms.ppo.experience import Experience
from elastic_lightning.algorithms.ppo.metrics import ratio_deviation, summarised
from elastic_lightning.functional import masked_mean, ppo_policy_loss, ppo_value_loss
from elastic_lightning.policies import ActorCritic, Prompts, Rollout, counter_uniforms
from elastic_lightning.ranks import max_of_ranks, sum_of_ranks

if TYPE_CHECKING:
    from elastic_lightning.algorithms.base import PolicyModule

PERMUTATION_SEED = 0x5EED  # keeps the draws that order a batch apart from those that sample it


class TrainingBatch(NamedTuple):
    """Rows of one PPO batch: everything the loss reads. `frozen_hidden` is that of `ScoredRollout`."""

    prompts: Prompts
    rollout: Rollout
    experience: Experience
    frozen_hidden: Tensor | None = None

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Valid tokens of each prompt and response, int64 [B] on the CPU: cutting a batch then waits for no GPU."""
        return self.prompts.mask.sum(dim=1).cpu(), self.rollout.mask.sum(dim=1).cpu()

    def rows(self, index: Tensor, prompt: int, response: int) -> TrainingBatch:
        """The given rows: the last `prompt` columns of their prompts, and the first `response` of their responses."""
        first = self.prompts.tokens.shape[1] - prompt

        def cut(parts: NamedTuple, columns: slice) -> NamedTuple:
            return type(parts)(*(None if tensor is None else tensor[index, columns] for tensor in parts))

        # Not blocking: the update waits for the device once a mini-batch, where it asks whether all is finite.
        index = index.to(self.prompts.tokens.device, non_blocking=True)
        columns, frozen = slice(first, first + prompt + response - 1), self.frozen_hidden
        frozen = None if frozen is None else frozen[index, columns]
        rollout, experience = cut(self.rollout, slice(response)), cut(self.experience, slice(response))
        return TrainingBatch(cut(self.prompts, slice(first, None)), rollout, experience, frozen)


class Cuttable(Protocol):
    """A batch that the update can cut: `TrainingBatch`, or what holds one and rows that something else learns from."""

    def lengths(self) -> tuple[Tensor, Tensor]: ...

    def rows(self, index: Tensor, prompt: int, response: int) -> Any: ...


Batch = TypeVar("Batch", bound=Cuttable)


class Objective(Protocol):
    """What an update minimises."""

    def token_counts(self, batch: Any) -> Tensor:
        """Valid tokens [K] of a micro-batch, float32: what its K losses are means over."""

    def __call__(self, batch: Any, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the loss, and of what is measured; `counts` [K] are of the whole mini-batch."""

    def beside(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Losses that do not read the rollout, once a mini-batch: name, this rank's share, the same with its weight."""


class PolicyObjective:
    """The clipped surrogate, the value loss and the entropy bonus, as means over response tokens."""

    def __init__(self, actor: ActorCritic, config: PPOConfig, temperature: float) -> None:
        self.actor, self.config, self.temperature = actor, config, temperature

    def token_counts(self, batch: TrainingBatch) -> Tensor:
        return batch.rollout.mask.sum().float()[None]

    def beside(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        return iter(())

    def __call__(self, batch: TrainingBatch, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config, (prompts, rollout, experience, frozen_hidden) = self.config, batch
        mask, tokens = rollout.mask, rollout.mask.sum().clamp(min=1)
        old_logprobs, advantages = rollout.logprobs[mask], experience.advantages[mask]
        sums = {"policy_loss": mask.new_zeros((), dtype=torch.float32)}
        sums["clip_fraction"] = sums["policy_loss"].clone()

        def token_loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
            every = torch.ones_like(logprobs, dtype=torch.bool)
            mean, clipped = ppo_policy_loss(logprobs, old_logprobs[part], advantages[part], every, config.clip)
            loss = mean * len(logprobs)
            sums["policy_loss"] += loss.detach()
            sums["clip_fraction"] += clipped.detach() * len(logprobs)
            return loss - config.entropy_coefficient * entropy.sum() if config.entropy_coefficient else loss

        token_sum, evaluation = self.actor(prompts, rollout.responses, token_loss, self.temperature, frozen_hidden)
        loss = token_sum / tokens
        with torch.no_grad():
            log_ratio = evaluation.logprobs - rollout.logprobs
            measured = {name: total / tokens for name, total in sums.items()} | {
                "entropy": masked_mean(evaluation.entropy, mask),
                "approx_kl": masked_mean(-log_ratio, mask),
                "ratio": masked_mean(log_ratio.exp(), mask),
            }
        if config.has_critic:
            value_loss, measured["value_clip_fraction"] = ppo_value_loss(
                evaluation.values, rollout.values, experience.returns, mask, config.value_clip
            )
            loss = loss + config.value_coefficient * value_loss
            measured["value_loss"] = value_loss.detach()
        share = self.token_counts(batch)[0] / counts[0]
        shares = {name: value * share for name, value in measured.items()}
        return loss * share, shares | {"ratio_deviation": ratio_deviation(log_ratio, mask)}


def update(module: PolicyModule, batch: Batch, objective: Objective) -> dict[str, float]:
    """Epochs of mini-batches over one PPO batch, that of all ranks.

    Args:
        module: whose optimizer steps; its `config` says how often, in how many parts, and how far.
        batch: to be cut into mini-batches and micro-batches. A row whose response has no tokens teaches nothing.
        objective: what is minimised.

    Returns:
        What was measured on the way, averaged over mini-batches.

    Raises:
        NotFinite: on all ranks alike, before a step would be made of numbers that are not.
    """
    config, optimizer, stopped = module.config, module.optimizers(), False
    measured: dict[str, list[Tensor]] = defaultdict(list)
    lengths = batch.lengths()
    for rows in mini_batches(module.sampling_seed, module.ppo_step, lengths[1] > 0, config):
        # From the shortest to the longest, and so of like length on every rank and in every micro-batch.
        ordered = rows[sum(lengths)[rows].argsort(stable=True)]
        own = ordered[module.global_rank :: module.trainer.world_size]
        parts = micro_batches(batch, own, lengths, config.micro_batch_size)
        statistics = accumulate_gradient(module, objective, parts)
        for name, value in statistics.items():
            measured[name].append(value)
        if config.target_kl is not None and config.stops_update(statistics["approx_kl"].item()):
            optimizer.zero_grad()  # `approx_kl` is that of all ranks: they stop alike
            stopped = True
            break
        losses = {name: value for name, value in statistics.items() if name.endswith("_loss")}
        if not module.has_gradient_scaler:
            module.grad_norm = gradient_norm(optimizer)
        check_finite(losses, None if module.has_gradient_scaler else module.grad_norm, statistics["ratio"])
        optimizer.step()
        measured["grad_norm"].append(module.grad_norm)
    module.faults.warn_of_ratio(torch.stack(measured["ratio"]).tolist(), module.ppo_step + 1)
    return summarised(measured, stopped)


def mini_batches(seed: int, ppo_step: int, learned_from: Tensor, config: PPOConfig) -> Iterator[Tensor]:
    """The rows of each mini-batch in turn, on the CPU: a pure function of (seed, ppo_step, epoch).

    A mini-batch of which no row is learned from is left out.
    """
    for epoch in range(config.epochs):
        uniforms = counter_uniforms(seed ^ PERMUTATION_SEED, ppo_step, torch.tensor([epoch]), len(learned_from))
        for rows in uniforms[0].argsort().tensor_split(config.mini_batches):
            if learned_from[rows].any():
                yield rows


def micro_batches(batch: Batch, rows: Tensor, lengths: tuple[Tensor, Tensor], size: int | None) -> list[Batch]:
    """The given rows (on the CPU), `size` at a time (all by default), each part without columns it does not need."""
    parts = []
    for part in rows.split(size or len(rows)):
        prompt, response = (max(1, int(length[part].max())) for length in lengths)  # responses may all be left out
        parts.append(batch.rows(part, prompt, response))
    return parts


def accumulate_gradient(module: PolicyModule, objective: Objective, parts: list[Any]) -> dict[str, Tensor]:
    """The gradient of one mini-batch, given this rank's micro-batches; what was measured, over all ranks."""
    module.optimizers().zero_grad()
    world = module.trainer.world_size  # DDP averages gradients over ranks, where their sum is wanted
    statistics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=module.device))
    for name, loss, weighted in objective.beside():
        with module.no_gradient_sync():
            module.manual_backward(weighted * world)
        statistics[name] = loss.detach()
    counts = sum_of_ranks(torch.stack([objective.token_counts(part) for part in parts]).sum(dim=0))
    deviations = []
    for part in parts:
        loss, measured = objective(part, counts)
        with nullcontext() if part is parts[-1] else module.no_gradient_sync():
            module.manual_backward(loss * world)
        deviations.append(measured.pop("ratio_deviation"))
        for name, value in measured.items():
            statistics[name] = statistics[name] + value
    sums = sum_of_ranks(torch.stack([*statistics.values()])).unbind()
    deviation = max_of_ranks(torch.stack(deviations).max())
    return dict(zip(statistics, sums, strict=True)) | {"ratio_deviation": deviation}
