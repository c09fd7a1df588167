"""Tokens that are no text: those that stand around one, those that end one, and those that have none.

`Frame` is the one rule for what stands before a text and after it. Supervised data, prompts, human text, pairs for
reward models, `evaluate`, HumanEval and `generate` all encode by it, so that a model reads what it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # texts tokenized at a time
IDS_ALONE = {"verbose": False, "return_attention_mask": False, "return_token_type_ids": False}
PROBES = 20  # tokens of a vocabulary that are tried as a text

Ends = int | Sequence[int] | None  # the token, or all those, that end a response


class Frame(NamedTuple):
    """The special tokens that ``tokenizer(text)`` puts before a text and after it: Llama's ``<s>``, T5's ``</s>``."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """What this tokenizer puts, seen where it encodes a text with special tokens and without."""
        special = set(tokenizer.all_special_ids)
        for text in _probes(tokenizer):
            plain = tokenizer(text, add_special_tokens=False, **IDS_ALONE)["input_ids"]
            whole = tokenizer(text, **IDS_ALONE)["input_ids"]
            if not plain or special.intersection(plain):  # an unknown word's token may be that which stands before
                continue
            for start in range(len(whole) - len(plain) + 1):
                if whole[start : start + len(plain)] == plain:
                    return cls(whole[:start], whole[start + len(plain) :])
        return cls([], [])

    @property
    def open(self) -> Frame:
        """The frame of a text that goes on: nothing after it."""
        return self._replace(after=[])

    def around(self, ids: list[int], longest: int | None = None) -> list[int]:
        """A text's own tokens in this frame, once: what the text itself spells out is not put there again.

        Of more than `longest` tokens those at the text's beginning are cut, as a tokenizer with ``truncation_side:
        left`` does.
        """
        (before, after), ids = self, self.inside(ids)
        if longest is not None:
            ids = ids[max(0, len(ids) - max(0, longest - len(before) - len(after))) :]
        return [*before, *ids, *after]

    def inside(self, ids: list[int]) -> list[int]:
        """A text's tokens without this frame, where they have it."""
        before, after = self
        if before and ids[: len(before)] == before:
            ids = ids[len(before) :]
        return ids[: -len(after)] if after and ids[-len(after) :] == after else ids


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None
) -> list[list[int]]:
    """Token ids of whole texts, as a classifier reads them; see `Frame.around` for `longest`."""
    frame = Frame.of(tokenizer)
    return [frame.around(ids, longest) for ids in plain_ids(tokenizer, texts)]


def encode_open(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None
) -> list[list[int]]:
    """Token ids of texts that go on, as a causal model reads them: with what stands before a text, nothing after."""
    frame = Frame.of(tokenizer).open
    return [frame.around(ids, longest) for ids in plain_ids(tokenizer, texts)]


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without what the tokenizer puts around it."""
    return in_chunks(lambda chunk: tokenizer(chunk, add_special_tokens=False, **IDS_ALONE), texts)


def in_chunks(encode: Callable[[list[str]], Any], texts: Sequence[str]) -> list[list[int]]:
    """The ``input_ids`` of all texts, some at a time."""
    starts = range(0, len(texts), CHUNK)
    return [ids for start in starts for ids in encode(list(texts[start : start + CHUNK]))["input_ids"]]


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Short texts: one, and where the tokenizer knows nothing of it some tokens of its own."""
    yield "a"
    special = set(tokenizer.all_special_tokens)
    yield from islice((token for token in tokenizer.get_vocab() if token not in special), PROBES)


class DrawnTokens(NamedTuple):
    """What sampling must know of a vocabulary, by the names of `sample`'s arguments.

    `eos_token_id`: all tokens that end a response; `pad_token_id` stands after them; `textless` [N] int64: ids that
    have no text and are never drawn, None where all have.
    """

    eos_token_id: tuple[int, ...]
    pad_token_id: int
    textless: Tensor | None


def end_ids(ends: Ends) -> tuple[int, ...]:
    """The tokens that end a response, none or some."""
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: Any, vocabulary: int) -> tuple[int, ...]:
    """The tokenizer's end of text, and those where a model's own `generate` stops: ``<end_of_turn>``, ``<|eot_id|>``.

    An id outside the vocabulary (a default of a config that nobody set) ends nothing.
    """
    named = end_ids(getattr(generation_config, "eos_token_id", None))
    found = dict.fromkeys((*end_ids(tokenizer.eos_token_id), *named))
    return tuple(token for token in found if 0 <= token < vocabulary)


def shares_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the pad token is also another one, which texts hold."""
    return tokenizer.pad_token_id in (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)


def textless_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor | None:
    """The ids below `vocabulary`, the number of a model's logits, for which the tokenizer has no token [N]; None where
    there are none. Vocabularies are padded to a multiple of 64 or 128."""
    missing = sorted(set(range(vocabulary)).difference(written_ids(tokenizer)))
    return torch.tensor(missing) if missing else None


def written_ids(tokenizer: PreTrainedTokenizerBase) -> Iterable[int]:
    """The ids of all tokens that may be written; Marian may have a vocabulary of its own for that side."""
    if getattr(tokenizer, "separate_vocabs", False):
        return tokenizer.target_encoder.values()
    return tokenizer.get_vocab().values()
