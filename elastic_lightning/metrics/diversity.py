"""How much the samples repeat one another."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from elastic_lightning.functional import ngrams, unique_rows


class DistinctN(Metric):
    """Different n-grams by all n-grams (Li et al., 2016, arXiv:1510.03055) over every sample since the reset.

    The state holds the n-grams themselves, each once, so that the value is exact over batches and ranks. It falls as
    more text is fed: compare values over the same number of samples alone. NaN when there is no n-gram.

    Args:
        n: tokens in an n-gram.

    Raises:
        ValueError: when `n` is not positive.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    rows: list[Tensor]
    total: Tensor

    def __init__(self, n: int, **kwargs) -> None:
        super().__init__(**kwargs)
        if n < 1:
            raise ValueError(f"n must be positive, got {n}")
        self.n = n
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.reset()

    def update(self, tokens: Tensor, mask: Tensor) -> None:
        """Add samples: int64 `tokens` [B, T] and bool `mask` [B, T]."""
        rows = ngrams(tokens, mask, self.n)
        self.total = self.total + len(rows)
        self.rows.append(unique_rows(rows))
        # Sorting the whole state in at every update would take quadratic time; once it has doubled is soon enough.
        if sum(map(len, self.rows)) > 2 * len(self.rows[0]):
            self.rows = [unique_rows(dim_zero_cat(self.rows))]

    def compute(self) -> Tensor:
        return len(unique_rows(dim_zero_cat(self.rows))) / self.total

    def reset(self) -> None:
        """Empty the state."""
        super().reset()
        # Never an empty list: a rank that saw no sample must still bring a [0, n] tensor to the gathering.
        self.rows = [torch.empty(0, self.n, dtype=torch.int64, device=self.device)]
