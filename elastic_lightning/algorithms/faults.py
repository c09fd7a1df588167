"""Batches that teach nothing: what was not finite is named and counted, and the run stops where there is too much."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from elastic_lightning.errors import NotFinite, UserError

USUAL_RATIO = (0.5, 2.0)  # of the mean over a mini-batch, whose expectation is 1
CAUSES = "a learning rate that is too high, no ppo.max_grad_norm, no ppo.target_kl, a low trainer.precision"


class Faults:
    """Counts of what went wrong in a run, over all of it and all ranks.

    Args:
        unit: what is counted, for messages.
        option: the option that limits it.

    Attributes:
        skipped: number of batches skipped, by what was not finite: reward, loss or gradient.
        masked: responses that were left out because the reward raised on them.
    """

    def __init__(self, unit: str = "PPO batch", option: str = "ppo.max_skipped") -> None:
        self.unit, self.option = unit, option
        self.skipped: dict[str, int] = {}
        self.masked = 0
        self._warned_of_ratio = False

    def skip(self, fault: NotFinite, number: int, limit: int) -> None:
        """Count the skipped batch of this number, and say so; `limit` of them may be skipped in a run.

        Raises:
            UserError: that is one too many.
        """
        self.skipped[fault.what] = self.skipped.get(fault.what, 0) + 1
        total = sum(self.skipped.values())
        counts = ", ".join(f"{what} {count}" for what, count in self.skipped.items())
        line = (
            f"{self.unit} {number} is skipped, its {fault.what} is not finite: {fault} "
            f"(skipped so far: {counts}; {self.option} is {limit})"
        )
        if total > limit:
            causes = "" if fault.what == "reward" or self.unit != "PPO batch" else f". Likely causes: {CAUSES}"
            raise UserError(f"{line}{causes}")
        warnings.warn(line, stacklevel=2)  # on every rank: each knows its own part

    def warn_of_ratio(self, ratios: list[float], batch: int) -> None:
        """Say, once, when a mean policy ratio is far from 1: the batch's data then says little about the update."""
        low, high = USUAL_RATIO
        far = next((ratio for ratio in ratios if not low < ratio < high), None)
        if far is not None and not self._warned_of_ratio:
            self._warned_of_ratio = True
            rank_zero_warn(
                f"the policy ratio explodes: {far:.3g} on average over a mini-batch of PPO batch {batch}, where 1 is "
                f"expected. Likely causes: {CAUSES}, or too many ppo.epochs and mini_batches over one batch"
            )

    def scalars(self) -> dict[str, float]:
        """The counts that are not 0, for the log."""
        counts = {**self.skipped, "masked": self.masked}
        return {f"fault/{name}": float(count) for name, count in counts.items() if count}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": dict(self.skipped), "masked": self.masked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.masked = dict(state["skipped"]), state["masked"]


def check_finite(losses: dict[str, Tensor], grad_norm: Tensor | None, ratio: Tensor) -> None:
    """Check what a step is about to be made of, all scalars, with one wait for the device.

    Args:
        losses: by name, of all ranks.
        grad_norm: of all ranks; None where a gradient scaler looks after it.
        ratio: the mini-batch's mean policy ratio, for the message.

    Raises:
        NotFinite: one of them is NaN or infinite.
    """
    named = losses if grad_norm is None else losses | {"gradient norm": grad_norm}
    values = dict(zip(named, torch.stack([*named.values()]).tolist(), strict=True))
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        numbers = ", ".join(f"{name} {value}" for name, value in bad.items())
        what = "loss" if losses.keys() & bad.keys() else "gradient"
        raise NotFinite(what, f"{numbers}, where the mean policy ratio is {ratio.item():.3g}")
