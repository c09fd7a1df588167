"""Drift in the toy world, measured against the grammar itself: no model judges, and nothing is estimated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.data.toy_grammar import ReviewGrammar, review_grammar

NOISE = 0.01  # share of the uniform mixture that keeps the likelihood of a broken review finite


class RatioMetric(Metric):
    """A ratio of two sums over (prompt, response) pairs; nan while the denominator is zero."""

    name: str
    full_state_update = False
    numerator: Tensor
    denominator: Tensor

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("numerator", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("denominator", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        return torch.where(self.denominator > 0, self.numerator / self.denominator, torch.nan)


class _ToyMetric(RatioMetric):
    """Measured against a grammar of reviews.

    `complete[i]` says that response `i` ended by itself (with the end-of-sequence token): then prompt and response
    must be a whole review, otherwise the beginning of one.
    """

    def __init__(self, grammar: ReviewGrammar | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.grammar = grammar or review_grammar()


class ToyAcceptance(_ToyMetric):
    """Share of the samples, prompt and response together, that the grammar can produce, in [0, 1]."""

    name = "toy_accept"
    higher_is_better = True

    def update(self, prompts: Sequence[str], responses: Sequence[str], complete: Sequence[bool]) -> None:
        self.numerator += self.grammar.accepts_each(_join(prompts, responses), complete).sum()
        self.denominator += len(responses)


class ToyNLL(_ToyMetric):
    """Nats per response word of the responses given their prompts, under the grammar with 1 % noise.

    All nats over all words: a long response counts for more than a short one. A response that ended pays for its end
    as well, so a sentence broken off is not free; the end is not counted as a word.
    """

    name = "toy_nll"
    higher_is_better = False

    def update(self, prompts: Sequence[str], responses: Sequence[str], complete: Sequence[bool]) -> None:
        whole = self.grammar.log_probabilities(_join(prompts, responses), complete, NOISE)
        given = self.grammar.log_probabilities(prompts, False, NOISE)
        self.numerator += (given - whole).sum()
        self.denominator += sum(len(response.split()) for response in responses)


def _join(prompts: Sequence[str], responses: Sequence[str]) -> list[str]:
    return [f"{prompt} {response}" for prompt, response in zip(prompts, responses, strict=True)]
