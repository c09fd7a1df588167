"""A reward is a callable (prompts, responses) -> scores; this is what all of them share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from elastic_lightning.errors import UserError
from elastic_lightning.policies import PolicyLM


class Scores(NamedTuple):
    """`total` [B] float32, what the policy is trained on; `components`: named [B] parts of it, for the log."""

    total: Tensor
    components: dict[str, Tensor]


class Reward(nn.Module):
    """Base class: override `forward(prompts, responses) -> scores [B]`, with B texts each.

    A response continues its prompt: ``prompt + response`` is the whole text, spaces included; that of an
    encoder-decoder is a text of its own. A module, so that a reward model moves to the policy's device; its weights are
    frozen and stay out of checkpoints.
    """

    def forward(self, prompts: list[str], responses: list[str]) -> Tensor:
        raise TypeError(f"{type(self).__name__} must override forward(prompts, responses) -> scores [B]")

    def bind(self, lm: PolicyLM) -> None:
        """Told before anything is scored which policy will be: for rewards that share its weights."""
        for part in self.modules():
            if part is not self and isinstance(part, Reward):
                part.bind(lm)

    def components(self, prompts: list[str], responses: list[str]) -> dict[str, Tensor]:
        """Named parts [B] each; a reward made of one part has none."""
        return {}

    def combine(self, components: dict[str, Tensor]) -> Tensor:
        """The total [B] from `components`, for rewards that have them."""
        return torch.stack(list(components.values())).sum(dim=0)


def score(reward: Reward, prompts: list[str], responses: list[str]) -> Scores:
    """Score B texts and check what comes back.

    Raises:
        UserError: the reward raised, or returned another number of scores than texts, or a NaN or infinite score.
    """
    try:
        with torch.inference_mode():
            components = reward.components(prompts, responses)
            total = reward.combine(components) if components else reward(prompts, responses)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the reward {type(reward).__name__} raised {type(error).__name__}: {' '.join(str(error).split())[:300]} "
            f"(first text of the batch: {_excerpt(prompts[0] + responses[0])})"
        ) from error
    checked = {name: _check(reward, name, values, prompts, responses) for name, values in components.items()}
    return Scores(_check(reward, "total", total, prompts, responses), checked)


def _check(reward: Reward, name: str, values: Tensor, prompts: list[str], responses: list[str]) -> Tensor:
    try:
        values = torch.as_tensor(values, dtype=torch.float32).clone()  # no inference tensor: it may enter a graph
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the reward {type(reward).__name__} ({name}) must return numbers: {error}") from error
    if values.shape != (len(responses),):
        raise UserError(
            f"the reward {type(reward).__name__} ({name}) must return one score a response: "
            f"got shape {tuple(values.shape)} for {len(responses)} responses"
        )
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        text = prompts[bad[0]] + responses[bad[0]]
        raise UserError(
            f"the reward {type(reward).__name__} ({name}) returned {values[bad[0]].item()} for {len(bad)} of "
            f"{len(responses)} texts; the first: {_excerpt(text)}"
        )
    return values


def _excerpt(text: str, length: int = 200) -> str:
    return repr(text if len(text) <= length else text[: length // 2] + " ... " + text[-length // 2 :])
