"""Between texts, as rewards and people read them, and tokens."""

from __future__ import annotations

from os.path import commonprefix
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from elastic_lightning.policies.batches import Prompts, Responses


class Texts(NamedTuple):
    """B prompts, B responses, and whether each response ended by itself.

    ``prompt + response`` is the whole text, except of an encoder-decoder, whose response is a text of its own.
    """

    prompts: list[str]
    responses: list[str]
    complete: list[bool]


def decode_texts(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, responses: Responses) -> Texts:
    """Decode without special tokens and padding.

    A response is the whole text minus the prompt's: decoded alone it would lose the space between the two.
    """
    prompt_texts, response_texts = [], []
    for prompt, response in zip(_rows(*prompts), _rows(*responses), strict=True):
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        whole = tokenizer.decode(prompt + response, skip_special_tokens=True)
        # Shorter than the prompt where a character is split between the two, or decoding cleans up across the border.
        before = commonprefix([before, whole])  # noqa: RUF071 (character by character is what is wanted)
        prompt_texts.append(before)
        response_texts.append(whole[len(before) :])
    return Texts(prompt_texts, response_texts, ended(responses, tokenizer.eos_token_id).tolist())


def decode_apart(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, responses: Responses) -> Texts:
    """`decode_texts` where a response is a text of its own, as an encoder-decoder writes it."""
    prompt_texts, response_texts = (
        tokenizer.batch_decode(_rows(*part), skip_special_tokens=True) for part in (prompts, responses)
    )
    return Texts(prompt_texts, response_texts, ended(responses, tokenizer.eos_token_id).tolist())


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Prompts:
    """B texts that are to be continued, so without an end."""
    encoded = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return Prompts(encoded["input_ids"], encoded["attention_mask"].bool())


def encode_sources(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int | None = None) -> Prompts:
    """B texts as an encoder reads them: cut to `longest` tokens, the end-of-text token last among them."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens, mask = _padded(_with_end(tokenizer, rows, longest), tokenizer.pad_token_id)
    lengths = mask.sum(dim=1, keepdim=True)
    columns = (torch.arange(tokens.shape[1]) + lengths) % tokens.shape[1]  # padding first
    return Prompts(tokens.gather(1, columns), mask.gather(1, columns))


def encode_targets(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int | None = None) -> Responses:
    """B texts as a decoder would write them: cut to `longest` tokens, the end-of-text token last among them."""
    rows = tokenizer(text_target=texts, add_special_tokens=False, verbose=False)["input_ids"]
    return Responses(*_padded(_with_end(tokenizer, rows, longest), tokenizer.pad_token_id))


def ended(responses: Responses, eos_token_id: int | None) -> Tensor:
    """Whether each response [B] holds the end-of-text token."""
    if eos_token_id is None:
        return responses.mask.new_zeros(len(responses.mask))
    return ((responses.tokens == eos_token_id) & responses.mask).any(dim=1)


def _with_end(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], longest: int | None) -> list[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [row[: None if longest is None else longest - len(end)] + end for row in rows]


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows as one tensor [B, L], padded at the end, and its mask."""
    tokens = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def _rows(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
