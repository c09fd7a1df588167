"""The translation game: two translators cooperate through a language that nobody supervises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from elastic_lightning.algorithms.base import PolicyModule, tokens_of_a_rank
from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.game_metrics import GameMetrics
from elastic_lightning.algorithms.hyperparameters import from_plain
from elastic_lightning.algorithms.ppo.config import PPOConfig
from elastic_lightning.algorithms.ppo.experience import make_experience, shape_scores
from elastic_lightning.algorithms.ppo.rollout import ScoredRollout, gather_each, of_all_ranks, repeated
from elastic_lightning.algorithms.ppo.update import PolicyObjective, TrainingBatch, update
from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    GameEvaluationBatch,
    ModelSource,
    PairedTexts,
    Prompts,
    Responses,
    Sampling,
    Texts,
    Translator,
    load_translator,
)
from elastic_lightning.policies.reference import ReferenceKind
from elastic_lightning.policies.saving import save_model
from elastic_lightning.ranks import alike, several, sum_of_ranks
from elastic_lightning.rewards import ReferenceLikelihood, Scores

LONGER = 20  # tokens that a translation may have beyond its reference


class GameBatch(NamedTuple):
    """What sender and receiver learn from, row by row: a PPO batch, and messages with their references."""

    sender: TrainingBatch
    lesson: PairedTexts

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Of the sender's prompts and messages."""
        return self.sender.lengths()

    def rows(self, index: Tensor, prompt: int, response: int) -> GameBatch:
        """The given rows, without columns that are padding in all of them."""
        return GameBatch(self.sender.rows(index, prompt, response), self.lesson.rows(index).trimmed())


class GameObjective:
    """The sender's PPO loss, the receiver's cross-entropy on its messages, and both's on supervised pairs.

    Args:
        sender: the policy's objective.
        receiver: what learns from the messages; None where it is frozen.
        supervised: translators and the pairs that they are supervised with, by name.
        weight: of the supervised losses.
    """

    def __init__(
        self,
        sender: PolicyObjective,
        receiver: Translator | None,
        supervised: dict[str, tuple[Translator, PairedTexts]],
        weight: float,
    ) -> None:
        self.sender, self.receiver, self.supervised, self.weight = sender, receiver, supervised, weight

    def token_counts(self, batch: GameBatch) -> Tensor:
        return torch.cat([self.sender.token_counts(batch.sender), batch.lesson.target.mask.sum().float()[None]])

    def __call__(self, batch: GameBatch, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, measured = self.sender(batch.sender, counts)
        if self.receiver is None:
            return loss, measured
        receiver_loss = self.receiver.nll(batch.lesson) / counts[1]
        return loss + receiver_loss, measured | {"receiver_loss": receiver_loss.detach()}

    def beside(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, (translator, pairs) in self.supervised.items():
            loss = translator.nll(pairs) / sum_of_ranks(pairs.target.mask.sum().float())
            yield f"supervised_{name}_loss", loss, self.weight * loss


class TranslationGame(PolicyModule):
    """Sender and receiver of FR -> EN -> DE (Lee et al. 2019, arXiv:1909.04499; Lu et al. 2020, arXiv:2003.12694).

    The sender is a policy: it is trained by PPO (REINFORCE with a learned baseline is one epoch of one mini-batch) on
    French prompts, and its reward is the log-likelihood of the German reference under the receiver, which reads the
    sampled English. The receiver learns the German from that English by cross-entropy, in the same optimizer steps.

    A training batch is `PairedTexts` (French, German), or a dict of such: ``game``, and ``fr_en`` and ``en_de``, pairs
    that sender and receiver are supervised with in every optimizer step (S2P). Validation reads `GameEvaluationBatch`.
    """

    trained_modules = ("actor", "receiver")
    tasks = ()

    def __init__(
        self,
        sender: ModelSource,
        receiver: ModelSource,
        ppo: PPOConfig = PPOConfig(epochs=1, mini_batches=1),  # noqa: B008 (frozen)
        sampling: Sampling = Sampling(max_new_tokens=40),  # noqa: B008 (frozen)
        receiver_learning_rate: float | None = 1e-5,
        freeze_sender: bool = False,
        normalise_reward: bool = True,
        supervised_weight: float = 1.0,
        reference: ReferenceKind = "auto",
        separate_value_trunk: bool = False,
        execution: Execution = Execution(),  # noqa: B008 (frozen)
        metrics: list[Metric] | None = None,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            sender: the policy, a translator from the source to the language of the messages.
            receiver: the translator from there to the target.
            ppo: the options of the sender's algorithm; the default is REINFORCE with a learned baseline.
            sampling: how messages are drawn.
            receiver_learning_rate: null freezes the receiver.
            freeze_sender: let the receiver alone learn.
            normalise_reward: the reward is nats per token of the reference; else their sum.
            supervised_weight: of the cross-entropy on supervised pairs, where the batch holds any.
            reference: what drift is measured against: adapter_off (LoRA), frozen_copy, or auto.
            separate_value_trunk: give the value function a transformer of its own.
            execution: what makes a run faster or smaller.
            metrics: further metrics on the sender's greedy messages, logged at validation.
            seed: of sampling; the run's seed_everything by default.
        """
        if receiver_learning_rate is not None and not 0 < receiver_learning_rate < math.inf:
            raise UserError(f"receiver_learning_rate must be above 0 (or null), got {receiver_learning_rate}")
        if supervised_weight < 0:
            raise UserError(f"supervised_weight must be 0 or more, got {supervised_weight}")
        sender, receiver = from_plain(ModelSource, sender), from_plain(ModelSource, receiver)
        translator = load_translator(receiver)
        if receiver_learning_rate is None:
            translator.requires_grad_(False)
        reward = ReferenceLikelihood(translator, normalise_reward)
        super().__init__(sender, reward, ppo, sampling, reference, separate_value_trunk, execution, None, seed)
        self.freeze_sender = freeze_sender
        if freeze_sender:
            self.actor.lm.requires_grad_(False)
        self.receiver = translator
        self.receiver_learning_rate = receiver_learning_rate
        self.supervised_weight = supervised_weight
        self.policy_metrics = GameMetrics(self.actor.lm.vocabulary, metrics)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise UserError("TranslationGame is not sharded, its two translators fit one device: use ddp")

    # One batch --------------------------------------------------------------------------------------------------

    def training_step(self, batch: PairedTexts | dict[str, PairedTexts], batch_idx: int) -> None:
        with self.ppo_batch():
            # 1. Prompts: the game's source texts. The rows of all ranks make one PPO batch.
            game = repeated(_pairs(batch), self.config.samples_per_prompt)
            first_row = self.check_prompts(game.source)
            # 2. Messages.
            with self.timed("rollout"):
                decoded = self.rollout(game.source, first_row)
            with self.timed("scoring"):
                # 3. What the receiver makes of them, and what it will learn from.
                texts, scores = alike(lambda: self.score_batch(game, decoded.responses))
                lesson = self.lesson(game, texts)
                # 4. How likely the sender's reference finds them.
                rollout, deviation = self.recompute(game.source, decoded)
                reference_logprobs = self.reference_logprobs(game.source, rollout.responses)
                scored = of_all_ranks(
                    ScoredRollout(game.source, rollout, scores, reference_logprobs, deviation=deviation)
                )
                lesson = paired_texts_of_all_ranks(lesson)
            # 5. Advantages of the sender's tokens.
            total = shape_scores(scored.scores.total, scored.rollout, self.config, self.drawn_tokens.eos_token_id)
            coefficient = self.kl_controller.coefficient
            experience = make_experience(scored.rollout, total, scored.reference_logprobs, coefficient, self.config)
            # 6. Both learn in the same optimizer steps.
            with self.timed("update"):
                training_batch = TrainingBatch(scored.prompts, scored.rollout, experience)
                losses = update(self, GameBatch(training_batch, lesson), self._objective(batch))
            # 7. The log.
            self.log_ppo_batch(scored, experience, losses)

    def prompts(self, batch: PairedTexts | GameEvaluationBatch | dict[str, PairedTexts]) -> Prompts:
        return _pairs(batch).source

    def score_batch(self, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
        texts = self.actor.lm.decode(self.tokenizer, self.prompts(batch), responses)
        return texts, Scores(self.reward(texts.responses, _pairs(batch).target), {})

    def lesson(self, game: PairedTexts, texts: Texts) -> PairedTexts:
        """The sampled messages and the references: what the receiver learns from."""
        return PairedTexts(self.receiver.read(texts.responses), game.target)

    def _objective(self, batch: PairedTexts | dict[str, PairedTexts]) -> GameObjective:
        """What a batch is learned from: the game, and the supervised pairs that stand beside it."""
        learns = {"fr_en": not self.freeze_sender, "en_de": self.receiver_learning_rate is not None}
        known = batch if isinstance(batch, dict) and self.supervised_weight > 0 else {}
        supervised = {name: pairs for name, pairs in known.items() if learns.get(name)}
        return GameObjective(
            PolicyObjective(self.actor, self.config, self.sampling.temperature),
            self.receiver if self.receiver_learning_rate is not None else None,
            {name: ({"fr_en": self.sender, "en_de": self.receiver}[name], pairs) for name, pairs in supervised.items()},
            self.supervised_weight,
        )

    def imitation_losses(self, batch: Any, targets: Responses) -> Iterator[Tensor]:
        """First the sender's, from what its teacher said; then the receiver's, from what the new sender says."""
        yield from super().imitation_losses(batch, targets)
        if self.receiver_learning_rate is not None:
            messages = self.sender.translate(self.prompts(batch), self.sampling.max_new_tokens)
            pairs = PairedTexts(self.receiver.read(messages), _pairs(batch).target)
            yield self.receiver.nll(pairs) / tokens_of_a_rank(pairs.target)

    @property
    def sender(self) -> Translator:
        """The policy as a translator."""
        return Translator(self.actor.lm, self.tokenizer)

    @property
    def receiver_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the receiver's two sides: data modules ask for it."""
        return self.receiver.tokenizer

    # Validation -------------------------------------------------------------------------------------------------

    def measure_texts(self, batch: GameEvaluationBatch, texts: Texts) -> dict[str, list[str]]:
        """Measure greedy decoding through the whole chain; what it says, one list of B texts a column."""
        greedy = self.sender.greedy(batch.pairs.source, self.sampling.max_new_tokens)
        messages = self.actor.lm.decode(self.tokenizer, batch.pairs.source, greedy)
        human = self.sender.write(batch.english)
        self.policy_metrics.update_texts(messages)
        self.policy_metrics.update_messages(messages.responses, batch.english, greedy, human)
        translations = self._translations(messages.responses, batch.pairs.target)
        self.policy_metrics.update_translations(translations, batch.german)
        return {
            "message": messages.responses,
            "translation": translations,
            "human_message": batch.english,
            "reference": batch.german,
        }

    def _translations(self, messages: list[str], references: Responses) -> list[str]:
        """What the receiver says to B messages: no row more than LONGER than its own reference, whatever its batch."""
        limits = references.mask.sum(dim=1, keepdim=True) + LONGER
        if self.receiver.lm.longest_target is not None:
            limits = limits.clamp(max=self.receiver.lm.longest_target)
        sources = self.receiver.read(messages)
        tokens, mask = self.receiver.greedy(sources, int(limits.max()))
        within = torch.arange(mask.shape[1], device=mask.device) < limits
        written = Responses(tokens, mask & within)
        return self.receiver.lm.decode(self.receiver.tokenizer, sources, written).responses

    # What others ask of the module ------------------------------------------------------------------------------

    def shadowed_parameters(self) -> dict[str, Tensor]:
        """The trained weights of both, by the names ``sender.*`` and ``receiver.*``; not the value function's."""
        receiver = {n: p for n, p in self.receiver.lm.named_parameters() if p.requires_grad}
        return _named("sender", super().shadowed_parameters()) | _named("receiver", receiver)

    def reference_weights(self) -> dict[str, Tensor] | None:
        """The sender's reference, by the names of `shadowed_parameters`; the receiver has none."""
        weights = super().reference_weights()
        return None if weights is None else _named("sender", weights)

    def save_pretrained(self, folder: str | Path, adapter: str = "merged") -> None:
        """Write two folders that transformers loads, ``sender`` and ``receiver``."""
        super().save_pretrained(Path(folder) / "sender", adapter)
        save_model(self.receiver.lm.model, self.receiver.tokenizer, Path(folder) / "receiver", adapter)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.receiver_learning_rate is None:
            return groups
        trained = [parameter for parameter in self.receiver.parameters() if parameter.requires_grad]
        return [*groups, {"params": trained, "lr": self.receiver_learning_rate, "name": "receiver"}]


def _pairs(batch: PairedTexts | GameEvaluationBatch | dict[str, PairedTexts]) -> PairedTexts:
    """Source and target of the game in any batch."""
    batch = batch["game"] if isinstance(batch, dict) else batch
    return batch.pairs if isinstance(batch, GameEvaluationBatch) else batch


def paired_texts_of_all_ranks(pairs: PairedTexts) -> PairedTexts:
    """The rows of all ranks in their order."""
    if not several():
        return pairs
    return PairedTexts(gather_each(pairs.source, left=True), gather_each(pairs.target))


def _named(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}
