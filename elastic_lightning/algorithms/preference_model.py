"""Supervised training of a reward model on preferences: pairs of answers of which one is better."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from elastic_lightning.algorithms.hyperparameters import check_task, from_plain, save_plain_hyperparameters
from elastic_lightning.algorithms.supervised import AdamWConfig, SupervisedModule, check_texts_fit
from elastic_lightning.errors import UserError
from elastic_lightning.functional import bradley_terry_loss, right_pairs
from elastic_lightning.metrics import LengthBias, Moments, PairAccuracy, PairCalibration
from elastic_lightning.policies import ModelSource, PreferenceBatch, load_tokenizer
from elastic_lightning.policies.classifier import new_classifier, pad_like
from elastic_lightning.rewards.normalization import ScoreNormalization


class PreferenceModel(SupervisedModule):
    """One score a text, trained so that the better of two answers scores higher; `PreferenceReward` reads the result.

    Every validation measures the mean and the deviation of the scores of its preferred answers. `save_pretrained`
    writes those of the last one beside the weights, for rewards that are normalised.
    """

    def __init__(
        self,
        classifier: ModelSource,
        margin_weight: float = 0.0,
        optimizer: AdamWConfig = AdamWConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """
        Args:
            classifier: the model to start from, such as the folder of a fine-tuned policy; its head is new.
            margin_weight: the preferred score is to be above by this times the batch's margin; 0 asks for no margin.
            optimizer: AdamW and its schedule.
        """
        super().__init__()
        if margin_weight < 0:
            raise UserError(f"margin_weight must be 0 or more, got {margin_weight}")
        classifier, optimizer = from_plain(ModelSource, classifier), from_plain(AdamWConfig, optimizer)
        save_plain_hyperparameters(self)
        self.tokenizer = load_tokenizer(
            classifier.tokenizer or classifier.path, trust_remote_code=classifier.trust_remote_code
        )
        self.model = new_classifier(classifier, self.tokenizer, num_labels=1).train()
        pad_like(self.model, self.tokenizer)
        self.margin_weight, self.optimizer_config = margin_weight, optimizer
        self.metrics = PreferenceMetrics()
        self.normalization: ScoreNormalization | None = None
        self.normalization_is_stale = False

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_task(self.trainer, "pairs")
        check_texts_fit(self.trainer, self.model)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        chosen, rejected = self.scores(batch)
        loss = self.weighted(self._loss(chosen, rejected, batch), len(chosen))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        self.log("train/accuracy", right_pairs(chosen, rejected).mean(), sync_dist=True)
        self.normalization_is_stale = True
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._measure(batch, "val")

    def on_validation_epoch_end(self) -> None:
        values = self._log_metrics("val")
        if not self.trainer.sanity_checking and values["chosen_score_deviation"] > 0:
            self.normalization = ScoreNormalization(values["chosen_score_mean"], values["chosen_score_deviation"])
            self.normalization_is_stale = False

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        self._measure(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def scores(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Scores [B] float32 of the preferred answers and of the others, in one forward pass over both."""
        tokens = torch.cat([batch.chosen_tokens, batch.rejected_tokens])
        mask = torch.cat([batch.chosen_mask, batch.rejected_mask])
        tokens = tokens.masked_fill(~mask, self.model.config.pad_token_id)
        chosen, rejected = self.model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0].float().chunk(2)
        return chosen, rejected

    def save_pretrained(self, folder: str | Path, adapter: str = "merged") -> None:
        """Write a folder that transformers loads, with the tokenizer and, after a validation, the normalisation."""
        super().save_pretrained(folder, adapter)
        if self.normalization is not None:
            if self.normalization_is_stale:
                rank_zero_warn(
                    "the saved reward normalisation is of the last validation, the weights were trained on since: "
                    "let training end with a validation (trainer.val_check_interval)"
                )
            self.normalization.write(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        measured = None if self.normalization is None else asdict(self.normalization)
        checkpoint["reward_normalization"] = {"measured": measured, "stale": self.normalization_is_stale}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        measured, self.normalization_is_stale = checkpoint["reward_normalization"].values()
        self.normalization = None if measured is None else ScoreNormalization(**measured)

    def _measure(self, batch: PreferenceBatch, stage: str) -> None:
        chosen, rejected = self.scores(batch)
        self.metrics.update(chosen, rejected, batch.chosen_length, batch.rejected_length)
        loss = self._loss(chosen, rejected, batch)
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(chosen))

    def _loss(self, chosen: Tensor, rejected: Tensor, batch: PreferenceBatch) -> Tensor:
        return bradley_terry_loss(chosen, rejected, self.margin_weight * batch.margin)

    def _log_metrics(self, stage: str) -> dict[str, float]:
        values = self.metrics.compute_and_reset()
        self.log(f"{stage}/accuracy", values["accuracy"], prog_bar=True)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items() if name != "accuracy"})
        return values


class PreferenceMetrics(nn.Module):
    """Metrics over one validation of a model of preferences, right on any number of ranks.

    - accuracy, accuracy_low, accuracy_high, pairs: see `PairAccuracy`;
    - calibration_error, confidence: see `PairCalibration`;
    - length_correlation, accuracy_worse_longer, accuracy_better_longer, accuracy_longest: see `LengthBias`;
    - chosen_score_mean, chosen_score_deviation: of the scores of preferred answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = PairAccuracy()
        self.calibration = PairCalibration()
        self.length_bias = LengthBias()
        self.chosen = Moments()

    def update(self, chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor) -> None:
        """Add B pairs by their scores [B] and lengths [B]."""
        self.accuracy.update(chosen, rejected)
        self.calibration.update(chosen, rejected)
        self.length_bias.update(chosen, rejected, chosen_length, rejected_length)
        self.chosen.update(chosen)

    def compute_and_reset(self) -> dict[str, float]:
        """All values; then all start anew."""
        values = self.accuracy.compute() | self.calibration.compute() | self.length_bias.compute()
        values |= {f"chosen_score_{name}": value for name, value in self.chosen.compute().items()}
        for metric in self.children():
            metric.reset()
        return {name: float(value) for name, value in values.items()}
