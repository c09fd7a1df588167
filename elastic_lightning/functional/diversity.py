"""How much a batch of texts repeats itself."""

import torch
from torch import Tensor


def ngrams(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """Every run of `n` valid tokens inside a row: int64 [B, T] and bool [B, T] -> [N, n], repetitions kept."""
    if tokens.shape[1] < n:
        return tokens.new_empty(0, n)
    return tokens.unfold(1, n, 1)[mask.unfold(1, n, 1).all(-1)]


def unique_rows(rows: Tensor) -> Tensor:
    """The different rows: [N, n] -> [U, n], sorted."""
    return torch.unique(rows, dim=0)


def distinct_n(tokens: Tensor, mask: Tensor, n: int) -> Tensor:
    """Different n-grams by all n-grams, over the whole batch (Li et al., 2016, arXiv:1510.03055).

    Args:
        tokens: int64 [B, T].
        mask: bool [B, T]; an n-gram never reaches over padding or from row to row.
        n: tokens in an n-gram.

    Returns:
        A float32 scalar, 1 where nothing is said twice; NaN when no row has `n` tokens.
    """
    rows = ngrams(tokens, mask, n)
    return torch.tensor(len(unique_rows(rows)), device=rows.device) / len(rows)
