"""Proximal policy optimization for language models, in manual optimization."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchmetrics import Metric

from elastic_lightning.algorithms.batch_statistics import batch_statistics, ratio_deviation
from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.experience import Experience, make_experience, shape_scores, without_unscored
from elastic_lightning.algorithms.faults import Faults, check_finite
from elastic_lightning.algorithms.hyperparameters import from_plain
from elastic_lightning.algorithms.minibatch import Lengths, MiniBatch, check_rows, micro_batches
from elastic_lightning.algorithms.policy_module import PolicyModule
from elastic_lightning.algorithms.ppo_config import PPOConfig
from elastic_lightning.algorithms.schedules import batches_of_run, check_end, schedule_factor
from elastic_lightning.algorithms.scored_batch import ScoredBatch
from elastic_lightning.algorithms.supervised import can_fuse
from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.functional import TokenLoss, masked_mean, ppo_policy_loss, ppo_value_loss
from elastic_lightning.policies import (
    ModelSource,
    PairedTexts,
    Prompts,
    Sampling,
    Texts,
    counter_uniforms,
)
from elastic_lightning.policies.reference import ReferenceKind
from elastic_lightning.policies.sharding import full
from elastic_lightning.ranks import alike, max_of_ranks, rows_of_ranks, several, sum_of_ranks
from elastic_lightning.rewards import Reward

FIRST_RATIO_TOLERANCE = 0.05
PERMUTATION_SEED = 0x5EED  # keeps the draws that order a batch apart from those that sample it


class PPO(PolicyModule):
    """PPO with a KL penalty against the reference, one optimizer, and the PPO batch as its clock (`ppo_step`).

    A training batch is `Prompts`, or holds them where `prompts` says; every batch is one rollout and `epochs` x
    `mini_batches` optimizer steps. REINFORCE with a learned baseline is this with one epoch and one mini-batch. Dropout
    is off for the policy throughout.
    """

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
        policy, ppo = from_plain(ModelSource, policy), from_plain(PPOConfig, ppo)
        sampling, execution = from_plain(Sampling, sampling), from_plain(Execution, execution)
        if ppo.missing_eos_penalty and not sampling.eos:
            raise UserError("ppo.missing_eos_penalty needs sampling.eos: without an end every response would pay it")
        super().__init__(policy, reward, sampling, reference, separate_value_trunk, execution, metrics, seed)
        self.save_plain_hyperparameters(ignore=["reward", "metrics"])
        self.automatic_optimization = False
        self.config = ppo
        self.kl_controller = ppo.kl_controller()
        self.seconds: dict[str, float] = {}
        self.grad_norm = torch.tensor(0.0)
        self.faults = Faults()
        self.batch_skipped = False  # the last training batch taught nothing: weight callbacks leave it out
        if policy.lora is not None and policy.lora.dropout > 0:
            rank_zero_warn("lora.dropout is 0 in reinforcement learning: the value given is not used")

    # One PPO batch ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Prompts | NamedTuple, batch_idx: int) -> None:
        self.batch_skipped = False
        try:
            self._learn_from(batch)
        except NotFinite as fault:  # on all ranks alike
            self._skip(fault)
        # After the log, which shows the rate that this batch was trained with.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")  # skipped before the first optimizer step
            self.lr_schedulers().step()

    def _learn_from(self, batch: Prompts | NamedTuple) -> None:
        """One PPO batch, from prompts to the log. NotFinite, on all ranks alike, says that it teaches nothing."""
        prompts = self.prompts(batch)
        rows = rows_of_ranks(len(prompts.tokens))
        alike(lambda: self._check(prompts, rows))
        with self.gathered(), self._timed("rollout"):
            decoded = self.rollout(prompts, self.ppo_step, sum(rows[: self.global_rank]))
        with self.gathered(), self._timed("scoring"):
            texts, scores = alike(lambda: self.score(batch, decoded.responses))
            trunk = self.trunk_hidden(prompts, decoded.responses)
            rollout = self.recompute(prompts, decoded, trunk)
            recomputed = rollout is not decoded
            reference_logprobs = self.reference_logprobs(prompts, rollout.responses, trunk)
            rollout = without_unscored(rollout, scores.valid)
            scored = ScoredBatch(prompts, rollout, scores, reference_logprobs, trunk, self.pairs(batch, texts))
            if several():
                scored = scored.of_all_ranks()
            if not scored.rollout.mask.any():
                raise NotFinite("reward", f"it raised on all {len(scored.prompts.tokens)} responses")
        shaped = shape_scores(scored.scores.total, scored.rollout, self.config, self.drawn_tokens.eos_token_id)
        coefficient = self.kl_controller.coefficient
        experience = make_experience(scored.rollout, shaped, scored.reference_logprobs, coefficient, self.config)
        with self._timed("update"):
            losses = self.update(MiniBatch(scored.prompts, scored.rollout, experience, scored.trunk, scored.pairs))
        if recomputed:
            deviation = ratio_deviation(rollout.logprobs - decoded.logprobs, rollout.mask)
            losses["rollout_ratio_deviation"] = max_of_ranks(deviation).item()
        self.ppo_step += 1
        self._log_batch(scored, experience, losses)

    def update(self, batch: MiniBatch) -> dict[str, float]:
        """Epochs of mini-batches over one PPO batch, that of all ranks; returns what was measured on the way, averaged.

        A mini-batch is the same on any number of ranks; each takes its share of the rows.
        """
        measured: dict[str, list[Tensor]] = defaultdict(list)
        lengths = Lengths.of(batch)
        learned_from = batch.rollout.mask.any(dim=1).cpu()  # not those that are left out
        for epoch in range(self.config.epochs):
            for rows in self._permutation(len(batch.prompts.tokens), epoch).tensor_split(self.config.mini_batches):
                if not learned_from[rows].any():
                    continue
                own = lengths.order(rows)[self.global_rank :: self.trainer.world_size]  # of like length on every rank
                parts = list(micro_batches(batch, own, lengths, self.config.micro_batch_size))
                statistics = self._accumulate_gradient(parts)
                for name, value in statistics.items():
                    measured[name].append(value)
                if self._moved_too_far(statistics["approx_kl"]):
                    self.optimizers().zero_grad()
                    return self._summarise(measured, stopped=True)
                self._check_finite(statistics)
                self.optimizers().step()
                measured["grad_norm"].append(self.grad_norm)
        return self._summarise(measured, stopped=False)

    def pairs(self, batch: Any, texts: Texts) -> PairedTexts | None:
        """What a second model learns from this batch and its B sampled texts; nothing here."""
        return None

    def _accumulate_gradient(self, parts: list[MiniBatch]) -> dict[str, Tensor]:
        """Backward over micro-batches. Each weighs its share of the mini-batch's tokens on all ranks, so the gradient
        is that of one big batch on one rank."""
        self.optimizers().zero_grad()
        beside = self._gradient_beside()
        counts = sum_of_ranks(torch.stack([self._token_counts(part) for part in parts]).sum(dim=0))
        statistics: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for part in parts:
            loss, measured = self._loss_share(part, counts)
            with nullcontext() if part is parts[-1] else self._no_gradient_sync():
                self.manual_backward(loss * self.trainer.world_size)  # DDP averages gradients over ranks
            for name, value in measured.items():
                if name == "ratio_deviation":
                    statistics[name] = torch.maximum(statistics[name], value)
                else:
                    statistics[name] = statistics[name] + value
        maximum = statistics.pop("ratio_deviation")
        named = statistics | beside
        sums = sum_of_ranks(torch.stack([*named.values()])).unbind()
        return dict(zip(named, sums, strict=True)) | {"ratio_deviation": max_of_ranks(maximum)}

    def _no_gradient_sync(self):
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if block is not None else nullcontext()

    def _gradient_beside(self) -> dict[str, Tensor]:
        """Backward of losses that do not read the rollout, and this rank's share of their values; none here."""
        return {}

    def _token_counts(self, batch: MiniBatch) -> Tensor:
        """Valid tokens [1] of a micro-batch, float32: what its loss is a mean over."""
        return batch.rollout.mask.sum().float()[None]

    def _loss_share(self, batch: MiniBatch, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's part of the mini-batch's loss and of what is measured; `counts` are of the whole."""
        loss, measured = self._loss(batch)
        share = self._token_counts(batch)[0] / counts[0]
        return loss * share, {n: value if n == "ratio_deviation" else value * share for n, value in measured.items()}

    def _loss(self, batch: MiniBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss per valid token and what is worth knowing of it, each a scalar."""
        config, (prompts, rollout, experience, trunk, _) = self.config, batch
        mask = rollout.mask
        token_loss, evaluation = self.actor(
            prompts, rollout.responses, self._token_loss(batch), self.sampling.temperature, trunk
        )
        value_loss, value_clip_fraction = ppo_value_loss(
            evaluation.values, rollout.values, experience.returns, mask, config.value_clip
        )
        loss = token_loss / mask.sum().clamp(min=1) + config.value_coefficient * value_loss
        with torch.no_grad():
            policy_loss, clip_fraction = ppo_policy_loss(
                evaluation.logprobs, rollout.logprobs, experience.advantages, mask, config.clip
            )
            log_ratio = evaluation.logprobs - rollout.logprobs
            measured = {
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": masked_mean(evaluation.entropy, mask),
                "clip_fraction": clip_fraction,
                "value_clip_fraction": value_clip_fraction,
                "approx_kl": masked_mean(-log_ratio, mask),
                "ratio": masked_mean(log_ratio.exp(), mask),
                "ratio_deviation": ratio_deviation(log_ratio, mask),
            }
        return loss, {name: value.detach() for name, value in measured.items()}

    def _token_loss(self, batch: MiniBatch) -> TokenLoss:
        """The part of the loss that reads log-probabilities and entropy, summed over the valid tokens it is given."""
        mask, entropy_coefficient = batch.rollout.mask, self.config.entropy_coefficient
        old_logprobs, advantages = batch.rollout.logprobs[mask], batch.experience.advantages[mask]
        every = torch.ones_like(old_logprobs, dtype=torch.bool)

        def loss(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
            mean, _ = ppo_policy_loss(logprobs, old_logprobs[part], advantages[part], every[part], self.config.clip)
            total = mean * len(logprobs)
            return total - entropy_coefficient * entropy.sum() if entropy_coefficient else total

        return loss

    def _moved_too_far(self, approx_kl: Tensor) -> bool:
        """Whether to stop the update; `approx_kl` is already that of all ranks, so they decide alike."""
        return self.config.target_kl is not None and approx_kl.item() > 1.5 * self.config.target_kl

    def _permutation(self, rows: int, epoch: int) -> Tensor:
        """Order of the rows [B] in an epoch, on the CPU: a pure function of (seed, ppo_step, epoch)."""
        epoch_row = torch.tensor([epoch])
        return counter_uniforms(self.sampling_seed ^ PERMUTATION_SEED, self.ppo_step, epoch_row, rows)[0].argsort()

    # Optimizer --------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as groups for the optimizer, each with its learning rate and name."""
        config = self.config
        policy = [parameter for parameter in self.actor.lm.parameters() if parameter.requires_grad]
        value = [*self.actor.value_head.parameters()]
        if self.actor.value_trunk is not None:
            value += [parameter for parameter in self.actor.value_trunk.parameters() if parameter.requires_grad]
        return [
            {"params": policy, "lr": config.learning_rate, "name": "policy"},
            {"params": value, "lr": config.value_learning_rate or config.learning_rate, "name": "value"},
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.config
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            betas=tuple(config.adam_betas),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=can_fuse(self.trainer, self.device) or None,  # None lets torch choose
        )
        steps = config.epochs * config.mini_batches

        def factor(done: int) -> float:
            return schedule_factor(config.schedule, done, config.warmup, batches_of_run(self.trainer, done, steps))

        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        check_end(self.trainer, "ppo.schedule", self.config.schedule)

    def on_train_start(self) -> None:
        check_end(self.trainer, "ppo.schedule", self.config.schedule, self.trainer.num_training_batches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, and not before `step`, because a gradient scaler unscales on the way.
        if self._scaled:
            self._measure_gradient()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        limit = self.config.max_grad_norm
        # On a GPU, asking whether there is anything to clip would wait for it; on a CPU it saves a pass over the model.
        if limit is not None and (self.device.type != "cpu" or self.grad_norm > limit):
            clip_grads_with_norm_(parameters, limit, self.grad_norm)

    def _measure_gradient(self) -> None:
        parameters = [parameter for group in self.optimizers().param_groups for parameter in group["params"]]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.grad_norm = full(norm)

    @property
    def _scaled(self) -> bool:
        """Whether a gradient scaler stands before the optimizer; it looks for infinite gradients, and expects some."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    # Faults -----------------------------------------------------------------------------------------------------

    def _check_finite(self, statistics: dict[str, Tensor]) -> None:
        """Raise NotFinite, on all ranks alike, where losses or gradient are not: before the step is taken."""
        losses = {name: value for name, value in statistics.items() if name.endswith("_loss")}
        if not self._scaled:
            self._measure_gradient()
        check_finite(losses, None if self._scaled else self.grad_norm, statistics["ratio"])

    def _skip(self, fault: NotFinite) -> None:
        """Give a batch up: steps taken before the fault stay, the clock and the schedule go on, the KL controller does
        not move, and weight callbacks leave the batch out of their average.

        Raises:
            UserError: more than ppo.max_skipped batches.
        """
        self.optimizers().zero_grad()
        self.batch_skipped = True
        self.ppo_step += 1
        self.faults.skip(fault, self.ppo_step, self.config.max_skipped)
        self.log_scalars(self.faults.scalars())

    # Measuring --------------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._synchronise()
        start = time.perf_counter()
        yield
        self._synchronise()
        self.seconds[name] = time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _summarise(self, measured: dict[str, list[Tensor]], stopped: bool) -> dict[str, float]:
        """Means over mini-batches, and the ratio of the first one, which must be 1."""
        self.faults.warn_of_ratio(torch.stack(measured["ratio"]).tolist(), self.ppo_step + 1)
        summary = {name: torch.stack(values).mean().item() for name, values in measured.items()}
        summary["first_ratio"] = measured["ratio"][0].item()
        summary["first_ratio_deviation"] = measured["ratio_deviation"][0].item()
        summary["optimizer_steps"] = float(len(measured["grad_norm"]))
        summary["stopped_early"] = float(stopped)
        if summary["first_ratio_deviation"] > FIRST_RATIO_TOLERANCE and self.ppo_step == 0:
            rank_zero_warn(
                f"the policy ratio deviates by {summary['first_ratio_deviation']:.3g} from 1 on the first mini-batch: "
                "the policy that is updated is not the one that sampled. Likely causes: low precision (compare "
                "trainer.precision: 32-true; execution.recompute_logprobs: always makes the ratio exact for one more "
                "forward pass), a model that ignores position ids or padding"
            )
        return summary

    def _log_batch(self, scored: ScoredBatch, experience: Experience, losses: dict[str, float]) -> None:
        """Log everything of one PPO batch, that of all ranks, at its ppo_step, and move the KL controller."""
        counts, measured = batch_statistics(scored, experience, self.drawn_tokens.eos_token_id, self.device)
        values = measured | {
            "kl_coefficient": self.kl_controller.coefficient,
            "learning_rate": self.optimizers().param_groups[0]["lr"],
            **losses,
        }
        self.kl_controller.update(measured["kl"], counts.rows)
        speed = {f"time/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        speed |= {f"time/{name}_tokens_per_second": counts.tokens / seconds for name, seconds in self.seconds.items()}
        speed["time/samples_per_second"] = counts.rows / sum(self.seconds.values())
        self.faults.masked += counts.left_out
        faults = self.faults.scalars() if counts.left_out else {}
        self.log_scalars({f"train/{name}": value for name, value in values.items()} | speed | faults)
        self.log_dict({f"train/{name}": value for name, value in values.items()} | speed, logger=False)

    # Checks and checkpoints -------------------------------------------------------------------------------------

    def _check(self, prompts: Prompts, rows: list[int]) -> None:
        """Raise a `UserError` for prompts that cannot be learned from; `rows` are the numbers of all ranks."""
        check_rows(rows, self.global_rank, self.config, sharded=bool(self._sharded))
        self.check_context(prompts.tokens.shape[1])
        if not prompts.mask.any(dim=1).all():
            raise UserError("a prompt of no tokens: a policy needs one at least; drop empty prompts from the data")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_controller"] = self.kl_controller.state_dict()
        checkpoint["faults"] = self.faults.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.kl_controller.load_state_dict(checkpoint["kl_controller"])
        if "faults" in checkpoint:  # not in those of earlier versions
            self.faults.load_state_dict(checkpoint["faults"])
