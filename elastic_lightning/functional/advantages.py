"""From rewards to advantages, over responses of different lengths.

`B` is the batch, `T` the response. A mask is bool [B, T], true on response tokens; padding ends the rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from elastic_lightning.functional.precision import at_least_float32


def zero_padding(values: Tensor, mask: Tensor) -> Tensor:
    """The values in at least float32, exactly 0 where the mask is false, whatever stood there (NaN included).

    No gradient flows into padding either: use it before `exp` and its like, not after.

    Raises:
        ValueError: when values and mask differ in shape, which would otherwise broadcast without a word.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values and mask must have one shape, got {list(values.shape)} and {list(mask.shape)}")
    return at_least_float32(values).where(mask, 0.0)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over the valid entries, of the whole tensor or along `dim`; 0 where no entry is valid."""
    return zero_padding(values, mask).sum(dim) / mask.sum(dim).clamp(min=1)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2015, arXiv:1506.02438) over finished responses.

    Args:
        rewards: [B, T], one reward a token: the KL penalty everywhere, the score on the last valid token.
        values: [B, T], the value of the state in which that token is chosen.
        mask: bool [B, T], padding at the end of a row.
        gamma: discount a token.
        lam: 0 is the one-step temporal difference, 1 the Monte-Carlo return.

    Returns:
        Advantages (not whitened) and returns (advantages + values), both [B, T] and 0 at padding.
    """
    rewards, values = zero_padding(rewards, mask), zero_padding(values, mask)
    # The response ends at its last valid token: the zeros of the padding are the values that follow.
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for step in reversed(range(deltas.shape[1])):
        running = deltas[:, step] + gamma * lam * running
        advantages[:, step] = running
    return advantages, advantages + values


def whiten(
    values: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Scale the valid entries to variance 1 and, with `shift_mean`, to mean 0.

    The variance is the biased one, over valid entries, with 1e-8 added (Ziegler et al., 2019, arXiv:1909.08593).

    Args:
        values: [B, T].
        mask: bool [B, T].
        shift_mean: False leaves the mean where it was, as is usual for rewards.
        reduce: sums a tensor over the ranks, so that the result does not depend on their number. It is called twice,
            on a rank without valid entries too.

    Returns:
        [B, T], 0 at padding.
    """
    reduce = reduce or _one_rank
    valid = zero_padding(values, mask)
    count, total = reduce(torch.stack([mask.sum().to(valid.dtype), valid.sum()]))
    count = count.clamp(min=1)
    mean = total / count
    # Two stages, for E[x^2] - E[x]^2 loses every digit when the mean is large beside the spread.
    centred = zero_padding(valid - mean, mask)
    variance = reduce(centred.square().sum()) / count
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else zero_padding(whitened + mean, mask)


def _one_rank(tensor: Tensor) -> Tensor:
    return tensor
