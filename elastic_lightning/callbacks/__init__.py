"""Callbacks: Elastic Reset and its relatives, samples, saving, progress."""

from elastic_lightning.callbacks.baseline import BigramBaseline
from elastic_lightning.callbacks.elastic_reset import (
    ElasticReset,
    EMAAnchor,
    EMAOnly,
    HareTortoise,
    ReferenceReset,
    ResetToInitial,
)
from elastic_lightning.callbacks.iterated_learning import IteratedLearning
from elastic_lightning.callbacks.preemption import Preemption
from elastic_lightning.callbacks.progress import RunProgress
from elastic_lightning.callbacks.samples import ResponseWriter, SampleLogger
from elastic_lightning.callbacks.saving import BatchCheckpoint, SavePretrained
from elastic_lightning.callbacks.weight_sets import WeightSets

__all__ = [
    "BatchCheckpoint",
    "BigramBaseline",
    "EMAAnchor",
    "EMAOnly",
    "ElasticReset",
    "HareTortoise",
    "IteratedLearning",
    "Preemption",
    "ReferenceReset",
    "ResetToInitial",
    "ResponseWriter",
    "RunProgress",
    "SampleLogger",
    "SavePretrained",
    "WeightSets",
]
