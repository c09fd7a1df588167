"""One reward model whose weights are the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.policies.classifier import trained_classifier
from elastic_lightning.policies.loading import load_tokenizer
from elastic_lightning.policies.sources import ModelSource
from elastic_lightning.rewards.ensemble import distinct_names, refuse_mixed_scales
from elastic_lightning.rewards.normalization import ScoreNormalization, read_normalization
from elastic_lightning.rewards.preference import PreferenceReward

SHAPELESS = ("num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters")  # no weight's shape tells


class WeightAveragedReward(PreferenceReward):
    """Score texts with the mean of the weights of several models of preferences (WARM, Rame et al., 2024,
    arXiv:2401.12187): it costs as much as one. They must start from the same weights, and are most alike where their
    heads do too (the same `seed_everything`, other data order or rates).

    Args:
        paths: folders of the models, two or more; adapters are merged before the mean is taken.
        normalise: by the mean of the models' means and of their deviations, where all have them; the averaged model's
            own differ the less, the more alike the models are (`ScoreNormalization` measures them).
        on, max_length, batch_size, dtype, trust_remote_code, special_tokens: see `ClassifierReward`.

    Raises:
        UserError: the models differ in kind, shape or tokenizer, or normalisation is there for some of them alone.
    """

    def __init__(
        self,
        paths: list[str],
        normalise: bool = True,
        on: Literal["text", "response"] = "text",
        max_length: int | None = None,
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
        special_tokens: bool = False,
    ) -> None:
        distinct_names(paths)
        super().__init__(paths[0], False, on, max_length, batch_size, "float32", trust_remote_code, special_tokens)
        for count, path in enumerate(paths[1:], start=2):
            other = trained_classifier(ModelSource(path, trust_remote_code=trust_remote_code))
            refuse_unlike(self.model, other, paths[0], path)
            tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
            refuse_unlike_tokenizers(self.tokenizer, tokenizer, paths[0], path)
            add_to_mean(self.model, other, count)
        self.model.to(getattr(torch, dtype))  # after the mean, which is taken in float32
        if normalise:
            measured = [read_normalization(path) for path in paths]
            refuse_mixed_scales(paths, [part is not None for part in measured])
            self.normalization = mean_normalization([part for part in measured if part is not None])


@torch.no_grad()
def add_to_mean(mean: nn.Module, other: nn.Module, count: int) -> None:
    """Make `mean`, the mean of count - 1 models, that of `count` with `other`, in place."""
    others = dict(other.named_parameters())
    for name, parameter in mean.named_parameters():
        parameter.lerp_(others[name], 1 / count)


def mean_normalization(parts: Sequence[ScoreNormalization]) -> ScoreNormalization | None:
    """Mean of means and of deviations; None of none."""
    if not parts:
        return None
    mean, deviation = (sum(values) / len(parts) for values in zip(*[(p.mean, p.deviation) for p in parts], strict=True))
    return ScoreNormalization(mean, deviation)


def refuse_unlike(model: PreTrainedModel, other: PreTrainedModel, path: str, other_path: str) -> None:
    """Weights have a mean where each has its like in the other model."""
    problem = None
    if type(model) is not type(other):
        problem = f"the one is a {type(model).__name__}, the other a {type(other).__name__}"
    else:
        shapes, others = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, other))
        unlike = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
        settings = [
            name for name in SHAPELESS if getattr(model.config, name, None) != getattr(other.config, name, None)
        ]
        if unlike:
            problem = f"{unlike[0]} is {shapes.get(unlike[0])} in the one, {others.get(unlike[0])} in the other"
        elif settings:
            problem = f"their {settings[0]} differ"
    if problem:
        raise UserError(f"the weights of {path} and {other_path} cannot be averaged: {problem}")


def refuse_unlike_tokenizers(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, path: str, other_path: str
) -> None:
    """The averaged model reads all texts by the first one's tokenizer."""
    vocabulary, others = tokenizer.get_vocab(), other.get_vocab()
    unlike = sorted(token for token in vocabulary.keys() | others.keys() if vocabulary.get(token) != others.get(token))
    if unlike or tokenizer.special_tokens_map != other.special_tokens_map:
        which = f"token {unlike[0]!r}" if unlike else "special tokens"
        raise UserError(f"the weights of {path} and {other_path} cannot be averaged: their tokenizers differ ({which})")
