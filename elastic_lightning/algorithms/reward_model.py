"""Supervised training of a reward model on labels: a sequence classifier."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from elastic_lightning.algorithms.hyperparameters import check_task, from_plain, save_plain_hyperparameters
from elastic_lightning.algorithms.supervised import AdamWConfig, SupervisedModule, check_texts_fit
from elastic_lightning.policies import ModelSource, load_tokenizer
from elastic_lightning.policies.classifier import new_classifier, pad_like


class LabelledTexts(NamedTuple):
    """`tokens` [B, L] int64 padded at the end, `mask` [B, L] bool, `labels` [B] int64."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor


class RewardModel(SupervisedModule):
    """Sequence classification by cross-entropy; `ClassifierReward` turns the result into a reward."""

    def __init__(
        self,
        classifier: ModelSource,
        labels: list[str] = ["NEGATIVE", "POSITIVE"],  # noqa: B006 (never changed)
        optimizer: AdamWConfig = AdamWConfig(),  # noqa: B008 (frozen)
    ) -> None:
        """
        Args:
            classifier: the model to train, or the architecture to start from.
            labels: names of the classes, in the order of their indices.
            optimizer: AdamW and its schedule.
        """
        super().__init__()
        classifier, optimizer = from_plain(ModelSource, classifier), from_plain(AdamWConfig, optimizer)
        save_plain_hyperparameters(self)
        self.tokenizer = load_tokenizer(
            classifier.tokenizer or classifier.path, trust_remote_code=classifier.trust_remote_code
        )
        names = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
        self.model = new_classifier(classifier, self.tokenizer, **names).train()
        pad_like(self.model, self.tokenizer)
        self.optimizer_config = optimizer
        self.accuracy = MulticlassAccuracy(len(labels), average="micro")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_task(self.trainer, "reward_model")
        check_texts_fit(self.trainer, self.model)

    def training_step(self, batch: LabelledTexts, batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self._logits(batch), batch.labels)
        loss = self.weighted(loss, len(batch.labels))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: LabelledTexts, batch_idx: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: LabelledTexts, batch_idx: int) -> None:
        self._measure(batch, "test")

    def _measure(self, batch: LabelledTexts, stage: str) -> None:
        logits = self._logits(batch)
        self.accuracy.update(logits, batch.labels)
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        self.log(f"{stage}/accuracy", self.accuracy, on_epoch=True, prog_bar=True)
        self.log(f"{stage}/loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch.labels))

    def _logits(self, batch: LabelledTexts) -> Tensor:
        tokens = batch.tokens.masked_fill(~batch.mask, self.model.config.pad_token_id)
        return self.model(input_ids=tokens, attention_mask=batch.mask.long()).logits.float()
