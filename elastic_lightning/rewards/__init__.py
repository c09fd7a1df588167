"""Rewards: callables (prompts, responses) -> scores [B]."""

from elastic_lightning.rewards.base import Reward, Scores, score
from elastic_lightning.rewards.classifier import ClassifierReward
from elastic_lightning.rewards.function import FunctionReward
from elastic_lightning.rewards.likelihood import ReferenceLikelihood
from elastic_lightning.rewards.weighted import WeightedReward

__all__ = ["ClassifierReward", "FunctionReward", "ReferenceLikelihood", "Reward", "Scores", "WeightedReward", "score"]
