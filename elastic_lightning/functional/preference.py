"""Scores of two answers against which of them people preferred: the Bradley-Terry loss and what measures its model.

A pair with equal scores counts as half right: a model that says nothing is right half of the time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z_95 = 1.959963984540054  # the normal distribution has 95 % within this many deviations


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin) over pairs (Bradley and Terry, 1952; the margin as in Llama 2,
    arXiv:2307.09288).

    Args:
        chosen: [B], scores of the preferred answers.
        rejected: [B], scores of the others.
        margin: [B] or a number, by how much the preferred score has to be above.
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()


def right_pairs(better: Tensor, worse: Tensor) -> Tensor:
    """1 where `better` is above `worse`, 0.5 where they are equal, else 0: [B] each -> float64 [B]."""
    return ((better - worse).sign().double() + 1) / 2


def wilson_interval(right: float, total: float, z: float = Z_95) -> tuple[float, float]:
    """Interval of a share from `right` of `total` trials (Wilson, 1927), by default at 95 %.

    Unlike the normal approximation it stays within 0 and 1 and has a width where all or none are right. NaN without
    trials.
    """
    if not total:
        return math.nan, math.nan
    share, squeeze = right / total, z * z / total
    middle = share + squeeze / 2
    half = z * math.sqrt(share * (1 - share) / total + squeeze / (4 * total))
    return (middle - half) / (1 + squeeze), (middle + half) / (1 + squeeze)


def confidence_bins(chosen: Tensor, rejected: Tensor, bins: int) -> Tensor:
    """Sums for calibration: float64 [3, bins] of pairs, of confidence, and of right answers in each bin.

    The confidence in a pair is the model's probability of its own choice, sigmoid(|chosen - rejected|), from 0.5 to 1;
    the bins divide that range evenly.
    """
    confidence = (chosen.double() - rejected.double()).abs().sigmoid()
    index = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    rows = torch.stack([torch.ones_like(confidence), confidence, right_pairs(chosen, rejected)])
    return rows.new_zeros(3, bins).index_add_(1, index, rows)


def expected_calibration_error(sums: Tensor) -> Tensor:
    """Mean distance of confidence and accuracy over the bins of `confidence_bins`, each weighing as many pairs as it
    has (Guo et al., 2017, arXiv:1706.04599). NaN without pairs."""
    count, confidence, right = sums
    return (confidence - right).abs().sum() / count.sum()


def correlation_sums(x: Tensor, y: Tensor) -> Tensor:
    """What `correlation` is made of: float64 [6], the sums of 1, x, y, x^2, y^2 and xy over [N] values."""
    x, y = x.double(), y.double()
    return torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]).sum(dim=1)


def correlation(sums: Tensor) -> Tensor:
    """Pearson's correlation from `correlation_sums`; NaN where either variable does not vary."""
    count, x, y, xx, yy, xy = sums
    covariance, variance_x, variance_y = count * xy - x * y, count * xx - x * x, count * yy - y * y
    return covariance / (variance_x.clamp(min=0) * variance_y.clamp(min=0)).sqrt()
