"""How well scores tell the better of two answers, how sure they are of it, and how much of that is length."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.functional import (
    confidence_bins,
    correlation,
    correlation_sums,
    expected_calibration_error,
    right_pairs,
    wilson_interval,
)


class PairAccuracy(Metric):
    """Share of pairs whose preferred answer has the higher score (equal scores: half), with its 95 % interval.

    The result is a dict: ``accuracy``, ``accuracy_low``, ``accuracy_high`` (Wilson's interval) and ``pairs``.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    right: Tensor
    pairs: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for state in ("right", "pairs"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add B pairs by their scores [B]."""
        self.right = self.right + right_pairs(chosen, rejected).sum()
        self.pairs = self.pairs + len(chosen)

    def compute(self) -> dict[str, Tensor]:
        low, high = wilson_interval(self.right.item(), self.pairs.item())
        return {
            "accuracy": self.right / self.pairs,
            "accuracy_low": self.right.new_tensor(low),
            "accuracy_high": self.right.new_tensor(high),
            "pairs": self.pairs,
        }


class PairCalibration(Metric):
    """Whether the model is right as often as it says: its probability of its own choice against its accuracy.

    The result is a dict: ``calibration_error`` (expected calibration error over bins of confidence) and ``confidence``,
    the mean probability predicted, whose observed counterpart is the pair accuracy.

    Args:
        bins: equal parts of the range of confidence, 0.5 to 1.

    Raises:
        ValueError: when `bins` is not positive.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    sums: Tensor

    def __init__(self, bins: int = 10, **kwargs) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"bins must be positive, got {bins}")
        self.bins = bins
        self.add_state("sums", torch.zeros(3, bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add B pairs by their scores [B]."""
        self.sums = self.sums + confidence_bins(chosen, rejected, self.bins)

    def compute(self) -> dict[str, Tensor]:
        count, confidence, _ = self.sums.sum(dim=1)
        return {"calibration_error": expected_calibration_error(self.sums), "confidence": confidence / count}


class LengthBias(Metric):
    """How much of a score is length.

    The result is a dict: ``length_correlation`` (Pearson, score and length over all answers), ``accuracy_worse_longer``
    and ``accuracy_better_longer`` (pair accuracy where the rejected or the preferred answer is the longer one; the more
    the first falls behind the second, the more the model counts words), and ``accuracy_longest``, of a baseline that
    always takes the longer answer (equal lengths: half). NaN where there is no such pair.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    sums: Tensor
    right: Tensor
    pairs: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(6, dtype=torch.float64), dist_reduce_fx="sum")
        for state in ("right", "pairs"):  # of pairs whose worse answer is longer, as long, and shorter
            self.add_state(state, torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor) -> None:
        """Add B pairs by their scores [B] and lengths [B]."""
        lengths = torch.cat([chosen_length, rejected_length])
        self.sums = self.sums + correlation_sums(torch.cat([chosen, rejected]), lengths)
        kind = (chosen_length - rejected_length).sign().long() + 1
        right = right_pairs(chosen, rejected)
        self.right = self.right.index_add(0, kind, right)
        self.pairs = self.pairs.index_add(0, kind, torch.ones_like(right))

    def compute(self) -> dict[str, Tensor]:
        accuracy = self.right / self.pairs
        _, equal, better_longer = self.pairs
        return {
            "length_correlation": correlation(self.sums),
            "accuracy_worse_longer": accuracy[0],
            "accuracy_better_longer": accuracy[2],
            "accuracy_longest": (better_longer + equal / 2) / self.pairs.sum(),
        }


class Moments(Metric):
    """Mean and deviation of all values, in float64; of the values themselves, not an estimate for a larger population.

    The result is a dict: ``mean`` and ``deviation``; NaN before the first value.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    sums: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        values = values.double().flatten()
        self.sums = self.sums + torch.stack([torch.ones_like(values), values, values * values]).sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        count, total, squares = self.sums
        mean = total / count
        return {"mean": mean, "deviation": (squares / count - mean * mean).clamp(min=0).sqrt()}
