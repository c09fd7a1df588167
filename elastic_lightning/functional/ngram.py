"""A smoothed bigram model: the bar that a language model has to clear."""

import torch
from torch import Tensor


def bigram_perplexity(train: Tensor, test: Tensor, vocabulary: int, discount: float = 0.75) -> Tensor:
    """Perplexity on `test` of an interpolated Kneser-Ney bigram model of `train` (Kneser, Ney, 1995).

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d * n(v, .) / c(v) * p(w), with c counts, n numbers of distinct pairs, and
    p(w) = (n(., w) + 1) / (n(., .) + V), so that every token has a probability. After an unseen v it is p(w).

    Args:
        train: tokens [N, L]; pairs are counted inside a row.
        test: tokens [M, K]; all but the first of a row are predicted.
        vocabulary: V; every token is below it.
        discount: d.
    """
    pairs, counts = _pairs(train, vocabulary).unique(return_counts=True)
    before, after = pairs // vocabulary, pairs % vocabulary
    total = torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, before, counts.double())
    followers = torch.bincount(before, minlength=vocabulary).double()
    continuation = (torch.bincount(after, minlength=vocabulary).double() + 1) / (len(pairs) + vocabulary)

    asked = _pairs(test, vocabulary)
    at = torch.searchsorted(pairs, asked).clamp(max=len(pairs) - 1)
    count = torch.where(pairs[at] == asked, counts[at], 0).double()
    first, second = asked // vocabulary, asked % vocabulary
    seen = total[first].clamp(min=1)
    backed_off = torch.where(total[first] > 0, discount * followers[first] / seen, 1.0)
    probability = (count - discount).clamp(min=0) / seen + backed_off * continuation[second]
    return (-probability.log().mean()).exp()


def _pairs(tokens: Tensor, vocabulary: int) -> Tensor:
    """Each pair of neighbours in a row as one number: first * V + second."""
    return (tokens[:, :-1] * vocabulary + tokens[:, 1:]).flatten().cpu()
