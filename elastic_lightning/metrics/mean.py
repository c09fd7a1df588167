"""A mean."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """Mean of all values, in float64; NaN before the first.

    Unlike torchmetrics' MeanMetric it replaces its states: one that `validate` has reset in inference mode can still be
    updated by a later `fit`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.total = self.total + values.sum(dtype=torch.float64)
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        return self.total / self.count
