"""Drift of the vocabulary."""

import torch
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.functional import jensen_shannon, token_counts


class TokenFrequencyDivergence(Metric):
    """Jensen-Shannon divergence (nats, in [0, ln 2]) of the samples' token frequencies from those of reference texts.

    No smoothing, and a bias that shrinks with the amount of text: see `elastic_lightning.functional.jensen_shannon`. It
    sees which words are used, in no order. NaN while there is no sample or no reference.

    Args:
        vocabulary: V; every token is below it.

    Raises:
        ValueError: when `vocabulary` is not positive.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    counts: Tensor
    reference_counts: Tensor

    def __init__(self, vocabulary: int, **kwargs) -> None:
        super().__init__(**kwargs)
        if vocabulary < 1:
            raise ValueError(f"vocabulary must be positive, got {vocabulary}")
        self.vocabulary = vocabulary
        for state in ("counts", "reference_counts"):
            self.add_state(state, torch.zeros(vocabulary, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tokens: Tensor, mask: Tensor, reference_tokens: Tensor, reference_mask: Tensor) -> None:
        """Add samples (int64 `tokens` [B, T] and bool `mask` [B, T]) and references (of any other shape)."""
        self.counts = self.counts + token_counts(tokens, mask, self.vocabulary)
        self.reference_counts = self.reference_counts + token_counts(reference_tokens, reference_mask, self.vocabulary)

    def compute(self) -> Tensor:
        return jensen_shannon(self.counts, self.reference_counts)
