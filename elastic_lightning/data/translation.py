"""Parallel text from the hub or from files, for supervised translation and for the translation game."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elastic_lightning.checks import check_counts
from elastic_lightning.data.corpus import Corpus, cleaned, cut_out, in_languages, rows, with_words, without
from elastic_lightning.data.game import FRENCH, GAME_LANGUAGES, GERMAN, GameDataModule
from elastic_lightning.data.pairs import ENGLISH, PairsDataModule
from elastic_lightning.data.parallel import ParallelText, read_parallel
from elastic_lightning.errors import UserError


@dataclass(frozen=True)
class Corpora:
    """What is trained, validated and tested on.

    Without `validation`, one sentence of each of so many pairs is held out of `train` for it, and as many for a test:
    by the English side, of which no sentence is on both sides of the cut.

    Attributes:
        train: corpus to train on.
        validation: corpus to validate on.
        test: corpus to test on.
        lower_case: lower the case of all of them.
        min_words: leave shorter English sentences out of `train`, and of what is held out of it.
    """

    train: ParallelText
    validation: ParallelText | None = None
    test: ParallelText | None = None
    lower_case: bool = False
    min_words: int = 1

    def __post_init__(self) -> None:
        check_counts("data's corpora.", vars(self), "min_words", least=0)
        if self.test is not None and self.validation is None:
            raise UserError("data's corpora have a `test` and no `validation`: give both, or none to hold both out")

    def held_out(self, languages: tuple[str, ...], size: int, seed: int) -> dict[str, Corpus]:
        """Splits cut out of `train`, all in these languages."""
        side = _side(languages)
        corpus = with_words(self.read(self.train, languages), side, self.min_words)
        return dict(zip(("train", "validation", "test"), cut_out(corpus, side, [size, size], seed), strict=True))

    def given(self, languages: tuple[str, ...]) -> dict[str, Corpus]:
        """The splits validation and, where there is one, test."""
        texts = {"validation": self.validation, "test": self.test}
        return {name: self.read(text, languages) for name, text in texts.items() if text is not None}

    def read(self, text: ParallelText, languages: tuple[str, ...]) -> Corpus:
        """One corpus, cleaned."""
        corpus = cleaned(read_parallel(text, languages), self.lower_case)
        if rows(corpus) == 0:
            raise UserError(f"{text.path} has no row with text in {' and '.join(languages)}")
        return corpus


class TranslationDataModule(PairsDataModule):
    """Pairs of sentences of one direction, to pretrain a translator on."""

    def __init__(self, corpora: Corpora, **options: Any) -> None:
        """
        Args:
            corpora: where the text lies and how it is split.
            options: see `PairsDataModule`.
        """
        super().__init__(**options)
        self.corpora, self.lower_case = corpora, corpora.lower_case

    def load(self) -> dict[str, Corpus]:
        languages = (self.source, self.target)
        if self.corpora.validation is None:
            return self.corpora.held_out(languages, self.eval_pairs, self.seed)
        splits, side = self.corpora.given(languages), _side(languages)
        train = with_words(self.corpora.read(self.corpora.train, languages), side, self.corpora.min_words)
        measured = (text for split in splits.values() for text in split[side])
        return {"train": without(train, side, measured), **splits}


class TranslationGameDataModule(GameDataModule):
    """French-German pairs, whose English is not even read for training unless a validation set is held out by it."""

    def __init__(self, corpora: Corpora, **options: Any) -> None:
        """
        Args:
            corpora: where the text lies and how it is split; `min_words` counts French words where the English of the
                training corpus is not read.
            options: see `GameDataModule`.
        """
        self.corpora, self.lower_case = corpora, corpora.lower_case
        super().__init__(**options)

    def load(self) -> dict[str, Corpus]:
        if self.corpora.validation is None:
            splits = self.corpora.held_out(GAME_LANGUAGES, self.eval_pairs, self.seed)
            return {**splits, "train": in_languages(splits["train"], FRENCH, GERMAN)}
        train = self.corpora.read(self.corpora.train, (FRENCH, GERMAN))
        return {"train": with_words(train, FRENCH, self.corpora.min_words), **self.corpora.given(GAME_LANGUAGES)}


def _side(languages: tuple[str, ...]) -> str:
    """The language by which sentences count as the same and as long: English, or else the first."""
    return ENGLISH if ENGLISH in languages else languages[0]
