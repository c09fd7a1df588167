"""Batches of pairs: texts beside the words as people wrote them, and answers of which one was preferred."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

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


class PreferenceBatch(NamedTuple):
    """B pairs of whole texts, prompt and answer, of which one was preferred.

    `chosen_tokens` and `rejected_tokens` [B, L] int64, padded at the end, one L for both; `chosen_mask` and
    `rejected_mask` [B, L] bool, True on real tokens; `margin` [B] float32, by how much the preferred answer was rated
    better (0 where the data has no scores); `chosen_length` and `rejected_length` [B] int64, tokens of the answer.
    """

    chosen_tokens: Tensor
    chosen_mask: Tensor
    rejected_tokens: Tensor
    rejected_mask: Tensor
    margin: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
