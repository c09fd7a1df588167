"""The toy world's translators: generated sentences in three languages. No download."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from elastic_lightning.checks import check_counts
from elastic_lightning.data.corpus import Corpus, in_languages, without
from elastic_lightning.data.game import FRENCH, GERMAN, GameDataModule
from elastic_lightning.data.pairs import ENGLISH, PairsDataModule
from elastic_lightning.data.toy import SPLIT_SEEDS
from elastic_lightning.data.toy_grammar import toy_tokenizer
from elastic_lightning.data.toy_languages import TOPICS, all_words, corpus_of, sample_meanings


class ToyTranslationDataModule(PairsDataModule):
    """Pairs of sentences of one direction, to pretrain a translator on; see `elastic_lightning.data.toy_languages`."""

    def __init__(self, topic: Literal["home", "outdoor"] = "home", train_pairs: int = 20_000, **options: Any) -> None:
        """
        Args:
            topic: what the sentences are about: home is what translators are pretrained on, outdoor that of the game.
            train_pairs: pairs to draw for training.
            options: see `PairsDataModule`.
        """
        super().__init__(**options)
        check_counts("data's ", locals(), "train_pairs")
        self.topic, self.train_pairs = topic, train_pairs

    def load(self) -> dict[str, Corpus]:
        splits = toy_splits(self.topic, self.train_pairs, self.eval_pairs, self.seed)
        return {name: in_languages(split, self.source, self.target) for name, split in splits.items()}

    def train_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """The tokenizer of whole words, of all three languages; the lexicon decides how many."""
        return toy_tokenizer(all_words())


class ToyTranslationGameDataModule(GameDataModule):
    """French-German pairs about outdoors, with the English held back; see `elastic_lightning.data.toy_languages`."""

    def __init__(self, train_pairs: int = 20_000, **options: Any) -> None:
        """
        Args:
            train_pairs: pairs to draw for training.
            options: see `GameDataModule`.
        """
        super().__init__(**options)
        check_counts("data's ", locals(), "train_pairs")
        self.train_pairs = train_pairs

    def load(self) -> dict[str, Corpus]:
        splits = toy_splits("outdoor", self.train_pairs, self.eval_pairs, self.seed)
        return {**splits, "train": in_languages(splits["train"], FRENCH, GERMAN)}

    def train_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """The tokenizer of whole words, of all three languages; the lexicon decides how many."""
        return toy_tokenizer(all_words())


def toy_splits(topic: str, train_pairs: int, eval_pairs: int, seed: int) -> dict[str, Corpus]:
    """Training, validation and test sentences in all three languages; no English one is in two of the splits."""
    sizes = {"train": train_pairs, "validation": eval_pairs, "test": eval_pairs}
    splits = {
        name: corpus_of(sample_meanings(size, TOPICS[topic], seed * 10 + SPLIT_SEEDS[name]))
        for name, size in sizes.items()
    }
    splits["validation"] = without(splits["validation"], ENGLISH, splits["test"][ENGLISH])
    measured = splits["validation"][ENGLISH] + splits["test"][ENGLISH]
    splits["train"] = without(splits["train"], ENGLISH, measured)
    return splits
