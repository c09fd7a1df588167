"""A reward model that shares the policy's base model."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.policies import PolicyLM
from elastic_lightning.policies.shared_classifier import SharedClassifier
from elastic_lightning.policies.sources import ModelSource
from elastic_lightning.rewards.preference import PreferenceReward


class AdapterReward(PreferenceReward):
    """Score texts as `PreferenceReward` does with the same LoRA adapter, on the base model that the policy has anyway.

    One base model in memory then carries the policy's adapter, the reference (adapter off) and the reward's adapter
    with its head. The policy needs LoRA, and both adapters one base model.

    Args:
        path: folder of the adapter, with its tokenizer.
        normalise, on, max_length, batch_size, special_tokens: see `PreferenceReward`.

    Raises:
        UserError: the folder holds no plain LoRA adapter of a one-label classifier.
    """

    def __init__(
        self,
        path: str,
        normalise: bool = True,
        on: Literal["text", "response"] = "text",
        max_length: int | None = None,
        batch_size: int = 64,
        special_tokens: bool = False,
    ) -> None:
        super().__init__(path, normalise, on, max_length, batch_size, special_tokens=special_tokens)

    def load(self, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        return SharedClassifier(source)

    def bind(self, lm: PolicyLM) -> None:
        self.model.bind(lm)
