"""What every algorithm that trains a policy against a reward has in common: models, sampling, validation, saving."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.kept_weights import (
    check_fingerprints,
    check_weights,
    fingerprint,
    names_without,
)
from elastic_lightning.algorithms.memory import keep_memory_of_fit, weights_cast_once
from elastic_lightning.algorithms.policy_metrics import PolicyMetrics
from elastic_lightning.algorithms.ranks import any_rank, rows_of_ranks
from elastic_lightning.algorithms.strategies import (
    check_shardable,
    check_sharding,
    check_strategy,
    layer_dtype,
    load_sharded_optimizer,
)
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
from elastic_lightning.policies.saving import save_model
from elastic_lightning.policies.sharding import check_apart, filled, full, gathered, models_of, shard, skeleton
from elastic_lightning.rewards import Reward, Scores, score

VALIDATION_LOGITS = 2**24  # of policy and initial policy each that stand in memory at a time
FROZEN_PARTS = ("actor", "initial", "reward", "receiver")  # where weights lie that checkpoints leave out
VALIDATION_STEP = -1  # uniforms of validation are those of this step: every validation draws with the same luck


class PolicyModule(LightningModule):
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

    trained_modules: tuple[str, ...] = ("actor",)  # what a checkpoint keeps the trained weights of

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
        loaded = load_source(policy)
        execution.check(policy, loaded.unmerged_adapter)
        disable_dropout(loaded.model)
        self.tokenizer = loaded.tokenizer
        lm = as_policy(loaded.model, execution.trainable_layers, execution.gradient_checkpointing)
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
        self._graph_samplers: dict[int, GraphSampler] = {}
        if execution.compile:
            lm.compile_update()
        self.policy_metrics = PolicyMetrics(metrics)
        self.sampling_seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.ppo_step = 0
        self._fingerprints: dict[str, str] | None = None
        self._sharded: dict[str, torch.nn.Module] = {}  # what is sharded, by name; frozen and trained
        self._skeletons: dict[str, torch.nn.Module] = {}  # of what is sharded, without weights; no part of the module
        self._rows_drawn = 0  # of this evaluation, on all ranks
        self.strict_loading = False  # frozen weights stay out of checkpoints; on_load_checkpoint checks the rest
        if policy.dtype != "float32" and policy.lora is None:
            rank_zero_warn(
                f"training all weights in {policy.dtype}: updates below its resolution are lost (at lr 1e-5 most are); "
                "prefer policy.dtype: float32 with trainer.precision: bf16-mixed, or LoRA"
            )

    # What others ask of the module ------------------------------------------------------------------------------

    def shadowed_parameters(self) -> dict[str, Tensor]:
        """The weights that Elastic Reset averages and resets: the policy's trainable ones, not the value function's."""
        return _trained(self.actor.lm)

    def reference_weights(self) -> dict[str, Tensor] | None:
        """The reference's weights by the names of `shadowed_parameters`, where it is a copy: theta_0, until moved."""
        weights = getattr(self.reference, "weights", lambda: None)()
        return None if weights is None else {name: weights[name] for name in _trained(self.actor.lm)}

    def save_pretrained(self, folder: str | Path, adapter: str = "merged") -> None:
        """Write a folder that transformers loads: policy and tokenizer, and the value head in a file of its own."""
        model, first = self.actor.lm.model, self.global_rank == 0
        if self._sharded:  # every rank is asked here, as each holds a part
            model = filled(self._skeletons["policy"], model, keep=first)
        head = {name: full(tensor.detach()) for name, tensor in self.actor.value_head.state_dict().items()}
        if self._sharded and not first:
            return
        save_model(model, self.tokenizer, folder, adapter)
        head = {name: tensor.cpu().contiguous() for name, tensor in head.items()}
        save_file(head, Path(folder) / "value_head.safetensors")

    # Sampling and scoring ---------------------------------------------------------------------------------------

    def sample(self, prompts: Prompts, step: int, first_row: int = 0, lm: PolicyLM | None = None) -> Rollout:
        """One response a prompt, from `lm` (the policy by default); the draws are a function of (seed, step, global
        row, position)."""
        self.check_context(prompts.tokens.shape[1])
        rows = torch.arange(len(prompts.tokens), device=self.device) + first_row
        uniforms = counter_uniforms(self.sampling_seed, step, rows, self.sampling.max_new_tokens)
        lengths = draw_lengths(self.sampling_seed, step, rows, self.sampling)
        lm = self.actor.lm if lm is None else lm
        ends = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        columns = GraphSampler.capacity(prompts.tokens.shape[1], self.sampling)
        if self._sharded:  # every decode step of a rank gathers each layer from all: they stop together
            return sample(self.actor, prompts, self.sampling, uniforms, *ends, lm, lengths=lengths, going_on=any_rank)
        if self.device.type != "cuda" or not self.execution.cuda_graphs or not lm.takes_static_masks(columns):
            with weights_cast_once(self.device.type):
                return sample(self.actor, prompts, self.sampling, uniforms, *ends, lm, lengths=lengths)
        if id(lm) not in self._graph_samplers:
            self._graph_samplers[id(lm)] = GraphSampler(self.actor, self.sampling, *ends, lm)
        return self._graph_samplers[id(lm)](prompts, uniforms, lengths)

    def prompts(self, batch: Any) -> Prompts:
        """The prompts of a batch of the data module: the batch itself, where it holds nothing else."""
        return batch

    def score(self, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
        """Texts of a batch with its responses, and their scores [B], on the module's device."""
        texts = self.actor.lm.decode(self.tokenizer, self.prompts(batch), responses)
        total, components, valid = score(self.reward, texts.prompts, texts.responses)
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
        ends = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return greedy(self.actor.lm, self.prompts(batch), self.sampling.max_new_tokens, *ends)

    def imitation_losses(self, batch: Any, targets: Responses) -> Iterator[Tensor]:
        """The loss of a student, nats per token: one optimizer step each."""
        yield self.actor.lm.pair_nll(PairedTexts(self.prompts(batch), targets)) / targets.mask.sum()

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

    # Validation, test, prediction -------------------------------------------------------------------------------

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
        texts, scores = self._score_if_finite(batch, rollout.responses)
        scored = scores.total if scores.valid is None else scores.total[scores.valid]
        self.policy_metrics.update_samples(rollout.responses, texts.complete, scored)
        self._measure_drift(prompts, rollout.responses)
        return _as_dicts(texts, scores, self.measure_texts(batch, texts))

    def _score_if_finite(self, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
        """`score`; between training batches a batch whose reward is not finite is left out of what is measured."""
        try:
            return self.score(batch, responses)
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
        whole = sampled.mask.shape[1] * self.actor.lm.config.vocab_size  # logits a row
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
            texts, scores = self.score(batch, rollout.responses)
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

    # Logging on the ppo_step axis -------------------------------------------------------------------------------

    @rank_zero_only
    def log_scalars(self, values: dict[str, float]) -> None:
        """Log at x = ppo_step. Lightning's own axis counts optimizer steps, or batches from 0."""
        for logger in self.loggers:
            logger.log_metrics(values, step=self.ppo_step)

    # Checks and checkpoints -------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard policy, reference and reward model, where the strategy is Lightning's `ModelParallelStrategy`."""
        if self.device_mesh is None or self._sharded:
            return
        check_sharding(self.trainer, self.execution)
        check_shardable(self.actor, self.reward)
        self.fingerprints()  # while weights are whole
        roots = {"policy": self.actor}
        roots |= {"reference": self.reference} if isinstance(self.reference, torch.nn.Module) else {}
        roots |= {"initial": self.initial} if self.initial is not self.reference else {}
        rewards = models_of(self.reward)
        check_apart(roots)
        self._skeletons["policy"] = skeleton(self.actor.lm.model)
        for root in (*roots.values(), *rewards):
            shard(root, self.device_mesh["data_parallel"], layer_dtype(self.trainer))
        self._sharded = roots
        self.portions.fixed = True
        for module in self.reward.modules() if isinstance(self.reward, torch.nn.Module) else ():
            if isinstance(getattr(module, "portions", None), Portions):
                module.portions.fixed = True
        self.register_state_dict_post_hook(_keep_trained)  # before what is frozen would be gathered for a checkpoint

    def gathered(self) -> AbstractContextManager:
        """Within this context, which records no gradient, parts of a sharded policy and its reference can be called."""
        return gathered(*self._sharded.values())

    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        keep_memory_of_fit(self.trainer, stage)
        moved = any(getattr(callback, "moves_reference", False) for callback in self.trainer.callbacks)
        if moved and self.initial is self.reference:  # once: a later fit or validate finds the reference moved
            self.initial = copy.deepcopy(self.reference)  # the penalty's anchor moves; drift is still from theta_0
        longest = getattr(getattr(self.trainer, "datamodule", None), "max_prompt_tokens", None)
        if longest is not None:
            self.check_context(longest)

    def teardown(self, stage: str) -> None:
        self._graph_samplers.clear()  # Lightning moves the weights from here on, and graphs hold their addresses

    def check_context(self, prompt_tokens: int) -> None:
        """Raise a `UserError` when prompts and responses do not fit the model's positions."""
        self.actor.lm.check_context(prompt_tokens, self.sampling.max_new_tokens)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained; reward, reference and frozen base weights are loaded from where they came from."""
        kept = self._checkpointed_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        checkpoint["ppo_step"], checkpoint["sampling_seed"] = self.ppo_step, self.sampling_seed
        checkpoint["frozen"] = dict(self.fingerprints())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self._sharded:
            check_weights(checkpoint["state_dict"], self.state_dict(), self._checkpointed_names())
        elif self.trainer.state.fn == "fit":  # the strategy has taken the weights, and checked their names and shapes
            for optimizer, state in zip(self.trainer.optimizers, checkpoint["optimizer_states"], strict=True):
                load_sharded_optimizer(optimizer, state)
        if "ppo_step" not in checkpoint:
            raise UserError("the checkpoint is not of a policy trained here: it holds no ppo_step")
        frozen, seed = checkpoint.get("frozen", {}), checkpoint.get("sampling_seed", self.sampling_seed)
        if self._trainer is None or self.trainer.state.fn != "fit":
            frozen.pop("reward", None)  # a policy may be measured by another reward, but not go on learning from it
        elif seed != self.sampling_seed:
            raise UserError(
                f"the checkpoint is of a run with seed {seed}, and this one's is {self.sampling_seed}: "
                "resume with the seed it was written with"
            )
        check_fingerprints(frozen, self.fingerprints())
        self.ppo_step = checkpoint["ppo_step"]

    def fingerprints(self) -> dict[str, str]:
        """Of the weights that checkpoints leave out, by the module's part; taken once, for they do not change."""
        if self._fingerprints is None:
            trained = {name: value for name, value in self.named_parameters() if value.requires_grad}
            left = names_without(state := self.state_dict(), trained)
            parts = {name: {n: state[n] for n in left if n.startswith(f"{name}.")} for name in FROZEN_PARTS}
            self._fingerprints = {name: fingerprint(weights) for name, weights in parts.items() if weights}
        return self._fingerprints

    def _checkpointed_names(self) -> set[str]:
        named = self.named_parameters(remove_duplicate=False)  # a tied output layer is one under two names
        trained = {name for name, parameter in named if parameter.requires_grad}
        return {name for name in trained if name.split(".")[0] in self.trained_modules}

    def save_plain_hyperparameters(self, ignore: list[str]) -> None:
        """`save_hyperparameters`, with dataclasses as dicts: a checkpoint must load with ``weights_only=True``."""
        self.save_hyperparameters(ignore=ignore)
        for name, value in list(self.hparams.items()):
            if is_dataclass(value):
                self.hparams[name] = asdict(value)


def _trained(lm: PolicyLM) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}


def _keep_trained(module: PolicyModule, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of `state_dict`: leave out what a checkpoint does not keep."""
    kept = {prefix + name for name in module._checkpointed_names()}
    for name in [name for name in state if name not in kept]:
        del state[name]


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
