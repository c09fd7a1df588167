"""Metrics of drift and reward: sums over batches and ranks, divided once at the end."""

from elastic_lightning.metrics.diversity import DistinctN
from elastic_lightning.metrics.kl import SequenceKL
from elastic_lightning.metrics.perplexity import TokenPerplexity
from elastic_lightning.metrics.reward import MeanReward

__all__ = ["DistinctN", "MeanReward", "SequenceKL", "TokenPerplexity"]
