"""French-German pairs for the translation game, with the English held back for measurement alone."""

from __future__ import annotations

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from elastic_lightning.data.pairs import ENGLISH, PairsDataModule
from elastic_lightning.errors import UserError
from elastic_lightning.policies import GameEvaluationBatch, load_tokenizer

FRENCH, GERMAN = "fr", "de"
GAME_LANGUAGES = (FRENCH, ENGLISH, GERMAN)


class GameDataModule(PairsDataModule):
    """Base for the game; a subclass overrides `load`: French and German to train on, all three to measure on.

    Batches: `PairedTexts` of French and German in training, without any English; `GameEvaluationBatch` in validation
    and test. With `fr_en` or `en_de` a training batch is a dict: "game" as above, and under their names `PairedTexts`
    of what the translators were pretrained on (supervised self-play); an epoch is one of the game, and the others go
    round without end.

    Args:
        batch_size: pairs a training batch on one process.
        batch_tokens: instead of `batch_size`: tokens a training batch on one process, with padding, of the longer side.
        eval_batch_size: pairs a validation or test batch.
        tokenizer: hub id or folder, of the sender and by default of the receiver too; by default those of the module
            being trained, which are its `tokenizer` and, where it has one, its `receiver_tokenizer`.
        receiver_tokenizer: hub id or folder, of the German.
        max_prompt_tokens: longest French.
        max_target_tokens: longest German, with its eos.
        source_eos: end the French in eos too, as Marian's and T5's encoders expect.
        limit_pairs: use only so many training pairs, drawn at random.
        eval_pairs: pairs of a validation or test.
        fr_en: what the sender was pretrained on, to serve beside the game.
        en_de: what the receiver was pretrained on, to serve beside the game.
        seed: of the order of the data and of the split.
    """

    def __init__(
        self,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        eval_batch_size: int = 64,
        tokenizer: str | None = None,
        receiver_tokenizer: str | None = None,
        max_prompt_tokens: int = 64,
        max_target_tokens: int = 64,
        source_eos: bool = True,
        limit_pairs: int | None = None,
        eval_pairs: int = 1000,
        fr_en: PairsDataModule | None = None,
        en_de: PairsDataModule | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__(
            FRENCH,
            GERMAN,
            batch_size,
            batch_tokens,
            eval_batch_size,
            tokenizer,
            max_prompt_tokens,
            max_target_tokens,
            source_eos,
            limit_pairs=limit_pairs,
            eval_pairs=eval_pairs,
            seed=seed,
        )
        self.receiver_tokenizer_path = receiver_tokenizer
        given = {"fr_en": fr_en, "en_de": en_de}
        self.pretraining = {name: module for name, module in given.items() if module is not None}
        for name, module in self.pretraining.items():
            if f"{module.source}_{module.target}" != name:
                raise UserError(f"data's {name} is from {module.source} to {module.target}: set its source and target")
            if module.lower_case != self.lower_case:
                raise UserError(f"data's {name} and the game must both be lower-cased, or neither")

    def training_texts(self) -> list[str]:
        """French and German of the game, and all of what the translators were pretrained on."""
        return [
            *super().training_texts(),
            *(text for module in self.pretraining.values() for text in module.training_texts()),
        ]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            tokenizers = {"fr_en": self.source_tokenizer, "en_de": self.target_tokenizer}
            for name, module in self.pretraining.items():
                module.accompany(self, tokenizers[name])
                module.setup(stage)

    def train_dataloader(self) -> DataLoader | CombinedLoader:
        game = super().train_dataloader()
        if not self.pretraining:
            return game
        beside = {name: module.endless_dataloader() for name, module in self.pretraining.items()}
        return CombinedLoader({"game": game, **beside}, mode="min_size")

    def find_tokenizers(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """The tokenizers of sender and receiver."""
        sender = self.find_tokenizer()
        if self.receiver_tokenizer_path is not None:
            return sender, load_tokenizer(self.receiver_tokenizer_path)
        if self.tokenizer_path is None:
            return sender, getattr(self.trainer.lightning_module, "receiver_tokenizer", sender)
        return sender, sender

    def evaluation_batch(self, split: str, indices: list[int]) -> GameEvaluationBatch:
        """The pairs of these rows and all their texts."""
        texts = ([self.splits[split][language][index] for index in indices] for language in GAME_LANGUAGES)
        return GameEvaluationBatch(self.paired(split, indices), *texts)
