"""Sliding-window perplexity: of texts longer than a window every token is scored once, with enough text before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_lightning.errors import UserError
from elastic_lightning.policies import CausalLM, Responses, pad


class Document(NamedTuple):
    """Token ids, of which those before index `first` are context alone; the first of all has none and is not scored."""

    tokens: list[int]
    first: int = 1


class Window(NamedTuple):
    """A part of a document, of which the last `scored` tokens are scored."""

    tokens: list[int]
    scored: int


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood `nll` (nats a token) over `tokens` scored tokens of `documents`."""

    perplexity: float
    nll: float
    tokens: int
    documents: int


def windows(document: Document, length: int, stride: int) -> Iterator[Window]:
    """Windows of `length` tokens, each `stride` after the one before; the last one ends with the document.

    A token after the first window has `length - stride` tokens or more before it. (As in transformers' guide to the
    perplexity of fixed-length models.)
    """
    tokens, end = document.tokens, 0
    for begin in range(0, len(tokens), stride):
        before, end = end, min(begin + length, len(tokens))
        scored = end - max(before, document.first, 1)
        if scored > 0:
            yield Window(tokens[begin:end], scored)
        if end == len(tokens):
            return


@torch.no_grad()
def window_nll(lm: CausalLM, batch: Sequence[Window]) -> Tensor:
    """Negative log-likelihood of the scored tokens of each window, in nats, float64 [B]."""
    device = next(lm.parameters()).device
    tokens, mask = (part.to(device) for part in pad([window.tokens for window in batch], 0, left=False))
    lengths, scored = (torch.tensor(column, device=device)[:, None] for column in _sizes(batch))
    at = torch.arange(1, tokens.shape[1], device=device)
    targets = Responses(tokens[:, 1:], (at < lengths) & (at >= lengths - scored))
    hidden = lm.forward_hidden(lm.backbone, tokens[:, :-1], mask[:, :-1])
    return -lm.token_statistics(hidden, targets).logprobs.double().sum(dim=1)


def sliding_perplexity(
    lm: CausalLM,
    documents: Sequence[Document],
    length: int = 1024,
    stride: int = 512,
    batch_size: int = 8,
    watch: Callable[[int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of documents, each read by itself.

    Args:
        lm: in eval mode.
        documents: at least one of them with a token to score.
        length: tokens in a window.
        stride: tokens that a window is further on than the one before; from 1 to `length`.
        batch_size: windows a forward.
        watch: called after each forward with the number of tokens scored in it and the perplexity so far.

    Raises:
        UserError: the windows do not fit the model, or there is no token to score.
    """
    check_windows(length, stride)
    cut = [window for document in documents for window in windows(document, length, stride)]
    if not cut:
        raise UserError("perplexity: the texts hold no token to score: each needs two at least")
    cut.sort(key=lambda window: len(window.tokens), reverse=True)  # like lengths together, and memory's peak first
    if lm.longest_text is not None and len(cut[0].tokens) > lm.longest_text:
        raise UserError(
            f"perplexity: windows of {len(cut[0].tokens)} tokens do not fit the model's context of {lm.longest_text}: "
            "lower the window's length"
        )
    total, tokens = 0.0, 0
    for start in range(0, len(cut), batch_size):
        batch = cut[start : start + batch_size]
        total += window_nll(lm, batch).sum().item()
        scored = sum(window.scored for window in batch)
        tokens += scored
        if watch is not None:
            watch(scored, _exp(total / tokens))
    return Perplexity(_exp(total / tokens), total / tokens, tokens, len(documents))


def check_windows(length: int, stride: int) -> None:
    """Raise a `UserError` where windows would leave tokens out, or hold nothing to score."""
    if length < 2 or not 1 <= stride < length:
        raise UserError(f"perplexity: windows need length >= 2 and 1 <= stride < length, got {length} and {stride}")


def tokens_to_score(documents: Sequence[Document]) -> int:
    """How many tokens of the documents are scored, whatever the windows."""
    return sum(max(0, len(document.tokens) - max(document.first, 1)) for document in documents)


def _sizes(batch: Sequence[Window]) -> tuple[list[int], list[int]]:
    return [len(window.tokens) for window in batch], [window.scored for window in batch]


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
