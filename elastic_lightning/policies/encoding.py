"""From sentences to `PairedTexts`: token ids of both sides, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.policies.batches import PairedTexts, Prompts, Responses
from elastic_lightning.policies.special_tokens import IDS_ALONE, Frame, in_chunks, plain_ids


class EncodedPairs(NamedTuple):
    """Token ids of N pairs; every target ends in eos, and has it nowhere else."""

    source: list[list[int]]
    target: list[list[int]]

    def lengths(self) -> list[int]:
        """Tokens of the longer side of each pair."""
        return [max(map(len, sides)) for sides in zip(*self, strict=True)]

    def take(self, indices: Sequence[int]) -> EncodedPairs:
        return EncodedPairs(*([side[index] for index in indices] for side in self))


def encode_source(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], eos: bool, longest: int | None = None
) -> list[list[int]]:
    """Token ids of each text, as a translator reads it: in its tokenizer's `Frame`, cut to `longest` tokens.

    `eos` says whether the end-of-text token is among what stands after a text, which some tokenizers put there and some
    do not; a text that spells it out has it nowhere else.
    """
    end, (before, after) = eos_token_id(tokenizer), Frame.of(tokenizer)
    if not eos:
        after = [token for token in after if token != end]
    elif end not in after:
        after = [*after, end]
    else:
        after = [*dict.fromkeys(after)]
    frame = Frame(before, after)
    rows = plain_ids(tokenizer, texts)
    return [frame.around([token for token in ids if token != end], longest) for ids in rows]


def encode_target(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as a translator writes it, with one eos at the end.

    A tokenizer may have a vocabulary of its own for this side, as Marian's do.
    """
    end = eos_token_id(tokenizer)  # some tokenizers add it and some do not; and a text may spell it out
    encoded = in_chunks(lambda chunk: tokenizer(text_target=chunk, **IDS_ALONE), texts)
    return [[*(token for token in ids if token != end), end] for ids in encoded]


def within(pairs: EncodedPairs, longest_source: int, longest_target: int) -> list[int]:
    """Indices of the pairs of which neither side is longer; the eos counts."""
    return [
        index
        for index, (source, target) in enumerate(zip(*pairs, strict=True))
        if len(source) <= longest_source and len(target) <= longest_target
    ]


def truncated(rows: list[list[int]], longest: int) -> list[list[int]]:
    """Rows without what is too much; the last token stays, which may be eos."""
    return [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]


def paired(pairs: EncodedPairs, source_pad: int, target_eos: int) -> PairedTexts:
    """These pairs as one batch: sources padded at the left, targets at the end, with eos."""
    return PairedTexts(
        Prompts(*pad(pairs.source, source_pad, left=True)), Responses(*pad(pairs.target, target_eos, left=False))
    )


def eos_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-text token.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, and a translation must end: give another tokenizer")
    return tokenizer.eos_token_id


def pad(rows: list[list[int]], pad_token_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Rows as tokens [B, L] int64 and mask [B, L] bool, padded on one side."""
    length = max(1, max(len(row) for row in rows))
    tokens = torch.full((len(rows), length), pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[index, where] = torch.tensor(row, dtype=torch.int64)
        mask[index, where] = True
    return tokens, mask
