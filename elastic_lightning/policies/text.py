"""From tokens back to the texts that rewards and people read."""

from __future__ import annotations

from os.path import commonprefix
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastic_lightning.policies.batches import Prompts, Responses
from elastic_lightning.policies.special_tokens import Ends, Frame, end_ids


class Texts(NamedTuple):
    """B prompts, B responses, and whether each response ended by itself.

    ``prompt + response`` is the whole text, except of an encoder-decoder, whose response is a text of its own.
    """

    prompts: list[str]
    responses: list[str]
    complete: list[bool]


def decode_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    responses: Responses,
    ends: Ends = None,
    special_tokens: bool = False,
) -> Texts:
    """Decode without padding, and without what ends a response: the token or tokens `ends`, by default the tokenizer's.

    A response is the whole text minus the prompt's: decoded alone it would lose the space between the two. With
    `special_tokens` those within the text are kept, ``<think>`` or the marks of a turn, and not what the tokenizer puts
    before a text.
    """
    ends = tokenizer.eos_token_id if ends is None else ends
    prompt_texts, response_texts = [], []
    frame = Frame.of(tokenizer).open if special_tokens else None
    for prompt, response in zip(_rows(*prompts), _rows(*responses, ends), strict=True):
        prompt = prompt if frame is None else frame.inside(prompt)
        before = tokenizer.decode(prompt, skip_special_tokens=not special_tokens)
        whole = tokenizer.decode(prompt + response, skip_special_tokens=not special_tokens)
        # Shorter than the prompt where a character is split between the two, or decoding cleans up across the border.
        before = commonprefix([before, whole])  # noqa: RUF071 (character by character is what is wanted)
        prompt_texts.append(before)
        response_texts.append(whole[len(before) :])
    return Texts(prompt_texts, response_texts, ended(responses, ends).tolist())


def decode_apart(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    responses: Responses,
    ends: Ends = None,
    special_tokens: bool = False,
) -> Texts:
    """`decode_texts` where a response is a text of its own, as an encoder-decoder writes it."""
    ends = tokenizer.eos_token_id if ends is None else ends
    sources = _rows(*prompts)
    if special_tokens:
        frame = Frame.of(tokenizer)
        sources = [frame.inside(row) for row in sources]
    prompt_texts = _decode_side(tokenizer, sources, "source", special_tokens)
    response_texts = _decode_side(tokenizer, _rows(*responses, ends), "target", special_tokens)
    return Texts(prompt_texts, response_texts, ended(responses, ends).tolist())


def _decode_side(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], side: Literal["source", "target"], special_tokens: bool
) -> list[str]:
    """Texts of what an encoder reads or a decoder writes. Where Marian has a vocabulary for each it decodes by that of
    the target alone, and by the special ids of the source."""
    if not getattr(tokenizer, "separate_vocabs", False):
        return tokenizer.batch_decode(rows, skip_special_tokens=not special_tokens)
    vocabulary = tokenizer.encoder if side == "source" else tokenizer.target_encoder
    pieces = {index: piece for piece, index in vocabulary.items()}
    left_out = set() if special_tokens else set(tokenizer.all_special_tokens)
    decode = (tokenizer.spm_source if side == "source" else tokenizer.spm_target).decode_pieces
    words = ([pieces.get(index, tokenizer.unk_token) for index in row] for row in rows)
    return [decode([piece for piece in row if piece not in left_out]) for row in words]


def ended(responses: Responses, eos_token_id: Ends) -> Tensor:
    """Whether each response [B] holds an end-of-text token."""
    found = torch.zeros_like(responses.mask)
    for end in end_ids(eos_token_id):
        found |= responses.tokens == end
    return (found & responses.mask).any(dim=1)


def _rows(tokens: Tensor, mask: Tensor, left_out: Ends = None) -> list[list[int]]:
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    ends = set(end_ids(left_out))
    return [[token for token in row if token not in ends] for row in rows] if ends else rows
