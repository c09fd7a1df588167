"""Rewards: callables (prompts, responses) -> scores [B]."""

from elastic_lightning.rewards.adapter import AdapterReward
from elastic_lightning.rewards.base import Reward, Scores, reads_special_tokens, score
from elastic_lightning.rewards.classifier import ClassifierReward
from elastic_lightning.rewards.ensemble import EnsembleReward
from elastic_lightning.rewards.function import FunctionReward
from elastic_lightning.rewards.likelihood import ReferenceLikelihood
from elastic_lightning.rewards.normalization import ScoreNormalization, read_normalization
from elastic_lightning.rewards.preference import PreferenceReward
from elastic_lightning.rewards.weight_averaged import WeightAveragedReward
from elastic_lightning.rewards.weighted import WeightedReward

__all__ = [
    "AdapterReward",
    "ClassifierReward",
    "EnsembleReward",
    "FunctionReward",
    "PreferenceReward",
    "ReferenceLikelihood",
    "Reward",
    "ScoreNormalization",
    "Scores",
    "WeightAveragedReward",
    "WeightedReward",
    "read_normalization",
    "reads_special_tokens",
    "score",
]
