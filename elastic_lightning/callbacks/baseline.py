"""A baseline computed on the very tokens that a language model is tested on."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from elastic_lightning.errors import UserError
from elastic_lightning.functional import bigram_perplexity


class BigramBaseline(Callback):
    """At the end of a test logs ``test/bigram_perplexity``: that of a smoothed bigram model of the training tokens.

    The data module must have ``packed(split) -> tokens [N, block_size]``, as those of this project have.
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not hasattr(data, "packed"):
            raise UserError("BigramBaseline needs a data module with packed(split)")
        perplexity = bigram_perplexity(data.packed("train"), data.packed("test"), len(pl_module.tokenizer))
        pl_module.log("test/bigram_perplexity", perplexity.float())
