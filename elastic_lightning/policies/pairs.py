"""What translators are measured on: pairs of texts, and beside them the words as people wrote them."""

from __future__ import annotations

from typing import NamedTuple

from elastic_lightning.policies.batches import PairedTexts


class TranslationBatch(NamedTuple):
    """B pairs of one direction; `references` are the target texts, which BLEU compares with."""

    pairs: PairedTexts
    references: list[str]


class GameEvaluationBatch(NamedTuple):
    """B French-German pairs of the translation game, with all three texts of each.

    The English is there for measurement alone: training batches are bare `PairedTexts`.
    """

    pairs: PairedTexts
    french: list[str]
    english: list[str]
    german: list[str]
