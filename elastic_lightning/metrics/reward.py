"""Mean score of the responses."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanReward(Metric):
    """Mean score a response; NaN before the first update."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    total: Tensor
    responses: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("responses", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        """Add responses: `scores` [B]."""
        self.total = self.total + scores.sum(dtype=torch.float64)
        self.responses = self.responses + scores.numel()

    def compute(self) -> Tensor:
        return self.total / self.responses
