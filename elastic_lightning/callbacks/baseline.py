"""A baseline computed on the very tokens that a language model is tested on."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from elastic_lightning.errors import UserError
from elastic_lightning.functional import bigram_perplexity


class BigramBaseline(Callback):
    """At the end of a test logs ``test/bigram_perplexity``: that of a smoothed bigram model of the training tokens.

    The data module must have ``packed(split, texts) -> tokens [N, block_size]`` and ``eval_texts``, as those of this
    project have; the test tokens are those that the language model is tested on.
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not hasattr(data, "packed"):
            raise UserError("BigramBaseline needs a data module with packed(split, texts)")
        test = data.packed("test", data.eval_texts)
        perplexity = bigram_perplexity(data.packed("train"), test, len(pl_module.tokenizer))
        pl_module.log("test/bigram_perplexity", perplexity.float())
