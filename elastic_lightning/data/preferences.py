"""From pairs of answers to `PreferenceBatch`, for reward models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from elastic_lightning.data.dialogue import Dialogue
from elastic_lightning.data.questions import AnswerPair, Question, key_of
from elastic_lightning.policies import PreferenceBatch, pad
from elastic_lightning.policies.special_tokens import Frame, encode_whole

BARE = Frame([], [])


class Preference(NamedTuple):
    """Token ids of two whole texts, prompt and answer; the margin; and how many tokens each answer has."""

    chosen: list[int]
    rejected: list[int]
    margin: float
    chosen_length: int
    rejected_length: int

    def longest(self) -> int:
        """Tokens of the longer text."""
        return max(len(self.chosen), len(self.rejected))

    def shortened(self, tokens: int, frame: Frame = BARE) -> Preference:
        """Texts of so many tokens or fewer: a text loses its beginning, but not what the tokenizer puts around it, as
        it does where a reward reads it."""
        return Preference(
            frame.around(self.chosen, tokens),
            frame.around(self.rejected, tokens),
            self.margin,
            min(self.chosen_length, tokens),
            min(self.rejected_length, tokens),
        )


def draw_pairs(question: Question, number: int | None, seed: int) -> list[AnswerPair]:
    """So many of a question's pairs at random, in their order; a function of seed and question."""
    if number is None or len(question.pairs) <= number:
        return question.pairs
    drawn = random.Random(f"{seed} {key_of(question.text)}").sample(range(len(question.pairs)), number)
    return [question.pairs[index] for index in sorted(drawn)]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    dialogue: Dialogue,
    questions: Sequence[Question],
    per_question: int | None,
    seed: int,
) -> list[Preference]:
    """Pairs of each question as token ids, with the special tokens that the tokenizer puts around a text of its own."""
    rows = []
    for question in questions:
        pairs = draw_pairs(question, per_question, seed)
        answers = list(dict.fromkeys(answer for pair in pairs for answer in (pair.better, pair.worse)))
        texts = [dialogue.text(question.text, answer) for answer in answers]
        asked, *whole = encode_whole(tokenizer, [dialogue.prompt(question.text), *texts])
        ids = dict(zip(answers, whole, strict=True))
        for better, worse, margin in pairs:
            lengths = (len(ids[answer]) - len(asked) for answer in (better, worse))
            rows.append(Preference(ids[better], ids[worse], margin, *lengths))
    return rows


def preference_batch(rows: Sequence[Preference], pad_token_id: int) -> PreferenceBatch:
    """These pairs as one batch, padded at the end to one length."""
    chosen, rejected, margins, *lengths = (list(column) for column in zip(*rows, strict=True))
    tokens, mask = pad(chosen + rejected, pad_token_id, left=False)
    (chosen_tokens, rejected_tokens), (chosen_mask, rejected_mask) = (part.split(len(rows)) for part in (tokens, mask))
    return PreferenceBatch(
        chosen_tokens,
        chosen_mask,
        rejected_tokens,
        rejected_mask,
        torch.tensor(margins, dtype=torch.float32),
        *(torch.tensor(length) for length in lengths),
    )
