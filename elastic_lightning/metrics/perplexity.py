"""Perplexity from log-likelihoods already taken."""

import torch
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.functional import zero_padding


class TokenPerplexity(Metric):
    """exp of the mean negative log-likelihood a token; NaN without tokens.

    Unlike torchmetrics' `Perplexity` it takes the likelihoods, not the logits: no [B, T, V] tensor, no softmax in bf16.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    total: Tensor
    tokens: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, mask: Tensor) -> None:
        """Add tokens: `nll`, nats a token, of any shape, and a bool `mask` of the same."""
        self.total = self.total + zero_padding(nll, mask).sum(dtype=torch.float64)
        self.tokens = self.tokens + mask.sum()

    def compute(self) -> Tensor:
        return torch.exp(self.total / self.tokens)
