"""LightningModules."""

from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.language_model import LanguageModel
from elastic_lightning.algorithms.ppo.config import PPOConfig
from elastic_lightning.algorithms.ppo.module import PPO
from elastic_lightning.algorithms.preference_model import PreferenceModel
from elastic_lightning.algorithms.reward_model import LabelledTexts, RewardModel
from elastic_lightning.algorithms.supervised import AdamWConfig
from elastic_lightning.algorithms.translation_game import TranslationGame
from elastic_lightning.algorithms.translation_model import TranslationModel

__all__ = [
    "PPO",
    "AdamWConfig",
    "Execution",
    "LabelledTexts",
    "LanguageModel",
    "PPOConfig",
    "PreferenceModel",
    "RewardModel",
    "TranslationGame",
    "TranslationModel",
]
