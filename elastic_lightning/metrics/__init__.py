"""Metrics of drift, translation and reward: sums over batches and ranks, divided once at the end.

States are replaced, never changed in place: `Trainer.validate` resets them in inference mode, and a later `fit`, which
validates outside of it, could not add to such a tensor.
"""

from elastic_lightning.metrics.bleu import CorpusBLEU
from elastic_lightning.metrics.diversity import DistinctN
from elastic_lightning.metrics.frequency import TokenFrequencyDivergence
from elastic_lightning.metrics.kl import SequenceKL
from elastic_lightning.metrics.language_model import LanguageModelNLL
from elastic_lightning.metrics.mean import Mean
from elastic_lightning.metrics.perplexity import TokenPerplexity
from elastic_lightning.metrics.preference import LengthBias, Moments, PairAccuracy, PairCalibration

__all__ = [
    "CorpusBLEU",
    "DistinctN",
    "LanguageModelNLL",
    "LengthBias",
    "Mean",
    "Moments",
    "PairAccuracy",
    "PairCalibration",
    "SequenceKL",
    "TokenFrequencyDivergence",
    "TokenPerplexity",
]
