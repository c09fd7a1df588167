"""Supervised training of an encoder-decoder on pairs of texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_lightning.algorithms.hyperparameters import check_task, from_plain, save_plain_hyperparameters
from elastic_lightning.algorithms.supervised import AdamWConfig, SupervisedModule
from elastic_lightning.errors import UserError
from elastic_lightning.metrics import CorpusBLEU, TokenPerplexity
from elastic_lightning.policies import (
    ModelSource,
    PairedTexts,
    Prompts,
    TranslationBatch,
    as_policy,
    load_source,
    right_padded,
)


class TranslationModel(SupervisedModule):
    """Sequence-to-sequence training; a batch is `PairedTexts`, in validation and test `TranslationBatch`.

    The loss is label-smoothed cross-entropy, a mean over the batch's target tokens. Validation logs perplexity (without
    smoothing) and BLEU of greedy decoding and, in the test or where it is asked for, of beam search.
    """

    def __init__(
        self,
        policy: ModelSource,
        optimizer: AdamWConfig = AdamWConfig(),  # noqa: B008 (frozen)
        label_smoothing: float = 0.1,
        max_new_tokens: int = 64,
        beam_size: int = 5,
        validate_with_beam: bool = False,
    ) -> None:
        """
        Args:
            policy: the model to train, or the architecture to start from.
            optimizer: AdamW and its schedule.
            label_smoothing: share of the target spread evenly over the vocabulary.
            max_new_tokens: longest translation that is measured, in tokens.
            beam_size: hypotheses that beam search keeps.
            validate_with_beam: measure beam search at every validation too, not in the test alone; it is slow.
        """
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        for name, value in (("max_new_tokens", max_new_tokens), ("beam_size", beam_size)):
            if value < 1:
                raise UserError(f"{name} must be 1 or more, got {value}")
        policy, optimizer = from_plain(ModelSource, policy), from_plain(AdamWConfig, optimizer)
        save_plain_hyperparameters(self)
        loaded = load_source(policy)
        if not loaded.model.config.is_encoder_decoder:
            raise UserError(f"{type(loaded.model).__name__} is no encoder-decoder: see LanguageModel")
        self.lm, self.tokenizer = as_policy(loaded.model).train(), loaded.tokenizer
        self.optimizer_config = optimizer
        self.label_smoothing, self.max_new_tokens = label_smoothing, max_new_tokens
        self.beam_size, self.validate_with_beam = beam_size, validate_with_beam
        self.perplexity = TokenPerplexity()
        self.bleu_greedy, self.bleu_beam = CorpusBLEU(), CorpusBLEU()

    @property
    def model(self) -> nn.Module:
        return self.lm.model

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_task(self.trainer)
        data, source, target = getattr(self.trainer, "datamodule", None), self.lm.longest_source, self.lm.longest_target
        for name, length, context in (
            ("data's max_prompt_tokens", getattr(data, "max_prompt_tokens", None), source),
            ("data's max_target_tokens", getattr(data, "max_target_tokens", None), target),
            ("max_new_tokens", self.max_new_tokens, target),
        ):
            if None not in (length, context) and length > context:
                raise UserError(f"{name} {length} is longer than the model's context {context}")
        for logger in self.trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("bleu_signature", self.bleu_greedy.signature)

    def training_step(self, batch: PairedTexts, batch_idx: int) -> Tensor:
        targets = batch.target.tokens[batch.target.mask]
        loss = F.cross_entropy(self._logits(batch), targets, label_smoothing=self.label_smoothing)
        loss = self.weighted(loss, len(targets))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        self._measure(batch, "val", with_beam=self.validate_with_beam)

    def test_step(self, batch: TranslationBatch, batch_idx: int) -> None:
        self._measure(batch, "test", with_beam=True)

    def translate(self, source: Prompts, beam_size: int = 1) -> list[str]:
        """The most likely translations of B sources, as greedy decoding or a beam search finds them."""
        tokens, mask = right_padded(source)
        translations = self.model.generate(
            input_ids=tokens.masked_fill(~mask, 0),
            attention_mask=mask.long(),
            num_beams=beam_size,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
        )
        return self.tokenizer.batch_decode(translations, skip_special_tokens=True)

    def _measure(self, batch: TranslationBatch, stage: str, with_beam: bool) -> None:
        pairs, rows = batch.pairs, len(batch.references)
        nll = F.cross_entropy(self._logits(pairs), pairs.target.tokens[pairs.target.mask], reduction="none")
        self.perplexity.update(nll, torch.ones_like(nll, dtype=torch.bool))
        self.log(f"{stage}/perplexity", self.perplexity, on_epoch=True, prog_bar=True, batch_size=rows)
        self.bleu_greedy.update(self.translate(pairs.source), batch.references)
        self.log(f"{stage}/bleu_greedy", self.bleu_greedy, on_epoch=True, prog_bar=True, batch_size=rows)
        if with_beam:
            self.bleu_beam.update(self.translate(pairs.source, self.beam_size), batch.references)
            self.log(f"{stage}/bleu_beam", self.bleu_beam, on_epoch=True, batch_size=rows)

    def _logits(self, pairs: PairedTexts) -> Tensor:
        """Logits [N, V] float32 that predict the N valid target tokens, row by row: the output layer is most of what a
        position costs, and reads none that is padding."""
        return self.lm.logits(self.lm.response_hidden(*pairs)[pairs.target.mask]).float()
