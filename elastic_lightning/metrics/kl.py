"""KL of whole responses."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.functional import zero_padding


class SequenceKL(Metric):
    """Mean KL to the reference, in nats a sequence or nats a token; NaN before the first update.

    Args:
        per: "sequence" sums over a response and averages over responses, an empty one counting as 0;
            "token" averages over valid tokens.

    Raises:
        ValueError: when `per` is neither.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    total: Tensor
    sequences: Tensor
    tokens: Tensor

    def __init__(self, per: Literal["sequence", "token"] = "sequence", **kwargs) -> None:
        super().__init__(**kwargs)
        if per not in ("sequence", "token"):
            raise ValueError(f'per must be "sequence" or "token", got {per!r}')
        self.per = per
        for state in ("total", "sequences", "tokens"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, kl: Tensor, mask: Tensor) -> None:
        """Add responses: `kl` [B, T], an estimate or the exact value at each token, and bool `mask` [B, T]."""
        self.total = self.total + zero_padding(kl, mask).sum(dtype=torch.float64)
        self.sequences = self.sequences + len(kl)
        self.tokens = self.tokens + mask.sum()

    def compute(self) -> Tensor:
        return self.total / (self.sequences if self.per == "sequence" else self.tokens)
