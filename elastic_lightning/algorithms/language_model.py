"""Supervised training of a causal language model."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_lightning.algorithms.hyperparameters import check_task, from_plain, save_plain_hyperparameters
from elastic_lightning.algorithms.supervised import AdamWConfig, SupervisedModule
from elastic_lightning.errors import UserError
from elastic_lightning.functional import token_logprobs
from elastic_lightning.metrics import TokenPerplexity
from elastic_lightning.policies import ModelSource, as_policy, load_source
from elastic_lightning.policies.checked_model import context_length


class LanguageModel(SupervisedModule):
    """Next-token training on packed blocks of text; a batch is tokens [B, L] without padding."""

    def __init__(self, policy: ModelSource, optimizer: AdamWConfig = AdamWConfig()) -> None:  # noqa: B008 (frozen)
        """
        Args:
            policy: the model to train, or the architecture to start from.
            optimizer: AdamW and its schedule.

        Raises:
            UserError: the model cannot be loaded, or is none that PPO could go on with.
        """
        super().__init__()
        policy, optimizer = from_plain(ModelSource, policy), from_plain(AdamWConfig, optimizer)
        save_plain_hyperparameters(self)
        loaded = load_source(policy)
        if loaded.model.config.is_encoder_decoder:
            raise UserError(f"{type(loaded.model).__name__} is an encoder-decoder: see TranslationModel")
        as_policy(loaded.model)  # what a policy of a later stage cannot be is refused at this one
        self.model, self.tokenizer = loaded.model.train(), loaded.tokenizer
        self.optimizer_config = optimizer
        self.perplexity = TokenPerplexity()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_task(self.trainer, "language_model", "supervised")
        length = getattr(getattr(self.trainer, "datamodule", None), "block_size", None)
        context = context_length(self.model)
        if length is not None and context is not None and length > context:
            raise UserError(f"data's block_size {length} is longer than the model's context {context}")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        nll = self._nll(batch)
        loss = self.weighted(nll.mean(), nll.numel())
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._measure(batch)
        self.log("val/perplexity", self.perplexity, on_epoch=True, prog_bar=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._measure(batch)
        self.log("test/perplexity", self.perplexity, on_epoch=True)

    def _measure(self, batch: Tensor) -> None:
        nll = self._nll(batch)
        self.perplexity.update(nll, torch.ones_like(nll, dtype=torch.bool))

    def _nll(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood [B, L-1] of each token but the first of its block."""
        return -token_logprobs(self.model(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:])
