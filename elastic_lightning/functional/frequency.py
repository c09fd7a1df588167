"""How far one vocabulary of use is from another: counts of tokens and the divergence between their shares."""

import torch
from torch import Tensor


def token_counts(tokens: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """How often each token stands at a valid place: int64 and bool [B, T] -> int64 [V]; every token is below V."""
    valid = tokens[mask]
    return torch.zeros(vocabulary, dtype=torch.int64, device=tokens.device).index_add_(0, valid, torch.ones_like(valid))


def jensen_shannon(counts: Tensor, other_counts: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the shares of two counts [V], in nats (Lin, 1991).

    The mean KL of the two to their middle: 0 when they are alike, ln 2 when they have no token in common. It needs no
    smoothing, for the middle has every token that either has. The counts being samples, it is too large by about
    (K - 1) * (1/n + 1/m) / 8, with K tokens in use and n and m counted: compare values over the same number of texts.

    Returns:
        A float64 scalar; NaN when either side counted nothing.
    """
    shares, other = (c.double() / c.sum() for c in (counts, other_counts))
    middle = (shares + other) / 2
    return (_kl(shares, middle) + _kl(other, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of [V], where a token that p lacks adds nothing."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()
