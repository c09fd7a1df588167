"""Reinforcement-learning fine-tuning of language models that keeps the language: PPO and Elastic Reset on Lightning.

The parts load on first use, so that ``import elastic_lightning`` is light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "callbacks": (
        "ElasticReset",
        "HareTortoise",
        "ResetToInitial",
        "ReferenceReset",
        "EMAAnchor",
        "EMAOnly",
        "SampleLogger",
        "SavePretrained",
    ),
    "algorithms": ("PPO", "PPOConfig", "LanguageModel", "PreferenceModel", "RewardModel", "TranslationModel"),
    "policies": ("load_policy", "LoRA", "ModelSource", "Sampling"),
    "rewards": (
        "Reward",
        "AdapterReward",
        "ClassifierReward",
        "EnsembleReward",
        "FunctionReward",
        "PreferenceReward",
        "WeightAveragedReward",
        "WeightedReward",
    ),
    "data": (
        "IMDBDataModule",
        "StackExchangeDataModule",
        "ToyReviewsDataModule",
        "ToyTranslationDataModule",
        "ToyTranslationGameDataModule",
        "TranslationDataModule",
        "TranslationGameDataModule",
    ),
    "errors": ("UserError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"elastic_lightning.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'elastic_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
