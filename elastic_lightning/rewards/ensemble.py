"""Several reward models whose scores are combined: what one of them can be fooled by, another may not."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

import torch
from torch import Tensor, nn

from elastic_lightning.errors import UserError
from elastic_lightning.rewards.base import Reward
from elastic_lightning.rewards.preference import PreferenceReward


class EnsembleReward(Reward):
    """Mean, least, or mean less some deviations of the scores of several `PreferenceReward` (Coste et al., 2023,
    arXiv:2310.02743). The score of each is logged under its name: the parts of its path that tell it from the others.

    Args:
        paths: folders of the models, two or more.
        combine_by: "mean", "min", or "lower_bound", the mean less some deviations of the models' scores.
        deviations: how many, for "lower_bound".
        normalise: all by what was saved with each; raw scores of unlike models do not compare.
        on, max_length, batch_size, dtype, trust_remote_code, special_tokens: see `ClassifierReward`.

    Raises:
        UserError: fewer than two folders, the same one twice, or normalisation for some of them alone.
    """

    def __init__(
        self,
        paths: list[str],
        combine_by: Literal["mean", "min", "lower_bound"] = "mean",
        deviations: float = 1.0,
        normalise: bool = True,
        on: Literal["text", "response"] = "text",
        max_length: int | None = None,
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
        special_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.special_tokens = special_tokens
        if combine_by not in ("mean", "min", "lower_bound"):
            raise UserError(f"combine_by must be mean, min or lower_bound, got {combine_by!r}")
        self.names = distinct_names(paths)
        self.combine_by, self.deviations = combine_by, deviations
        options = (normalise, on, max_length, batch_size, dtype, trust_remote_code)
        self.rewards = nn.ModuleList(PreferenceReward(path, *options) for path in paths)
        if normalise:
            refuse_mixed_scales(paths, [reward.normalization is not None for reward in self.rewards])

    def components(self, prompts: list[str], responses: list[str]) -> dict[str, Tensor]:
        """Scores [B] of each model."""
        return {name: reward(prompts, responses) for name, reward in zip(self.names, self.rewards, strict=True)}

    def combine(self, components: dict[str, Tensor]) -> Tensor:
        """What the models agree on [B]."""
        scores = torch.stack(list(components.values()))
        if self.combine_by == "min":
            return scores.amin(dim=0)
        penalty = self.deviations * scores.std(dim=0, correction=0) if self.combine_by == "lower_bound" else 0.0
        return scores.mean(dim=0) - penalty

    def forward(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores [B] float32."""
        return self.combine(self.components(prompts, responses))


def distinct_names(paths: list[str]) -> list[str]:
    """Short names of folders: the parts of their paths that are not the same for all of them, or their numbers.

    Raises:
        UserError: fewer than two, or one twice.
    """
    if len(paths) < 2:
        raise UserError(f"give two or more folders of reward models, got {paths}")
    if len(set(map(PurePath, paths))) < len(paths):
        raise UserError(f"a reward model is given twice: {paths}")
    parts = [PurePath(path).parts for path in paths]
    if len(set(map(len, parts))) > 1:
        names = ["_".join(part for part in path if part not in ("/", "..")) for path in parts]
    else:
        differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
        names = ["_".join(part for part, keep in zip(path, differ, strict=True) if keep) for path in parts]
    return names if len(set(names)) == len(names) else [f"model_{number}" for number in range(1, len(names) + 1)]


def refuse_mixed_scales(paths: list[str], normalised: list[bool]) -> None:
    """Scores of which some alone are normalised do not compare."""
    if any(normalised) and not all(normalised):
        with_file, without = (paths[normalised.index(kind)] for kind in (True, False))
        raise UserError(
            f"{with_file} has a reward_normalization.json and {without} has none: their scores do not compare; "
            "write the missing one, or set normalise: false"
        )
