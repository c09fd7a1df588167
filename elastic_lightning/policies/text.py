"""From tokens back to the texts that rewards and people read."""

from __future__ import annotations

from os.path import commonprefix
from typing import NamedTuple

from torch import Tensor
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


def ended(responses: Responses, eos_token_id: int | None) -> Tensor:
    """Whether each response [B] holds the end-of-text token."""
    if eos_token_id is None:
        return responses.mask.new_zeros(len(responses.mask))
    return ((responses.tokens == eos_token_id) & responses.mask).any(dim=1)


def _rows(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
