"""The translation game: two translators cooperate through a language that nobody supervises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.game_metrics import GameMetrics
from elastic_lightning.algorithms.hyperparameters import from_plain
from elastic_lightning.algorithms.minibatch import MiniBatch
from elastic_lightning.algorithms.policy_module import tokens_of_a_rank
from elastic_lightning.algorithms.ppo import PPO
from elastic_lightning.algorithms.ppo_config import PPOConfig
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
from elastic_lightning.ranks import sum_of_ranks
from elastic_lightning.rewards import ReferenceLikelihood, Scores

LONGER = 20  # tokens that a translation may have beyond its reference


class TranslationGame(PPO):
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
        self._supervised: dict[str, PairedTexts] = {}  # of the batch in hand

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise UserError("TranslationGame is not sharded, its two translators fit one device: use ddp")

    # What the two learn from ------------------------------------------------------------------------------------

    def prompts(self, batch: PairedTexts | GameEvaluationBatch | dict[str, PairedTexts]) -> Prompts:
        return _pairs(batch).source

    def score(self, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
        texts = self.actor.lm.decode(self.tokenizer, self.prompts(batch), responses)
        return texts, Scores(self.reward(texts.responses, _pairs(batch).target), {})

    def pairs(self, batch: Any, texts: Texts) -> PairedTexts | None:
        """The messages and the references: what the receiver learns from."""
        if self.receiver_learning_rate is None:
            return None
        return PairedTexts(self.receiver.read(texts.responses), _pairs(batch).target)

    def training_step(self, batch: PairedTexts | dict[str, PairedTexts], batch_idx: int) -> None:
        known = batch if isinstance(batch, dict) and self.supervised_weight > 0 else {}
        learns = {"fr_en": not self.freeze_sender, "en_de": self.receiver_learning_rate is not None}
        self._supervised = {name: pairs for name, pairs in known.items() if learns.get(name)}
        super().training_step(batch, batch_idx)

    def _token_counts(self, batch: MiniBatch) -> Tensor:
        counts = super()._token_counts(batch)
        return counts if batch.pairs is None else torch.cat([counts, batch.pairs.target.mask.sum().float()[None]])

    def _loss_share(self, batch: MiniBatch, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, measured = super()._loss_share(batch, counts)
        if batch.pairs is None:
            return loss, measured
        receiver_loss = self.receiver.nll(batch.pairs) / counts[1]
        return loss + receiver_loss, measured | {"receiver_loss": receiver_loss.detach()}

    def _gradient_beside(self) -> dict[str, Tensor]:
        losses = {}
        for name, pairs in self._supervised.items():
            translator = {"fr_en": self.sender, "en_de": self.receiver}[name]
            loss = translator.nll(pairs) / sum_of_ranks(pairs.target.mask.sum().float())
            with self._no_gradient_sync():
                self.manual_backward(self.supervised_weight * loss * self.trainer.world_size)
            losses[f"supervised_{name}_loss"] = loss.detach()
        return losses

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


def _named(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}
