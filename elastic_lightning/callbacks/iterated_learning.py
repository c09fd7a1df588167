"""Seeded iterated learning: a student from the earlier weights learns what the trained one says."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from elastic_lightning.callbacks.weight_sets import WeightSets
from elastic_lightning.callbacks.weight_store import Weights, clone
from elastic_lightning.callbacks.weight_telemetry import log
from elastic_lightning.errors import UserError
from elastic_lightning.functional import copy_
from elastic_lightning.ranks import mean_of_ranks, objects_of_ranks


class IteratedLearning(WeightSets):
    """Every `every` training batches the online model is a teacher, and what it was a generation ago its student.

    The student imitates the teacher's greedy responses to the last `steps` batches, one optimizer step each, and takes
    its place: what is easily learned survives, what was only drift does not (Lu et al. 2020, "Countering Language Drift
    with Seeded Iterated Learning", arXiv:2003.12694; with supervision beside it, SSIL, arXiv:2009.14066).

    The module says how to imitate: ``imitation_targets(batch)`` is what the teacher says to a batch, and
    ``imitation_losses(batch, targets)`` yields the student's losses in turn, each of which is one optimizer step (a
    sender learns from its teacher, then a receiver from the new sender). A loss may depend on the steps before it.

    Args:
        every: training batches of a generation, k1 (4,000 in the paper's translation game).
        steps: batches that the student learns from, k2 (400 there).
        learning_rate: of the student's AdamW, which starts anew in each generation.
        parameters: patterns of parameter names that take part; all trainable ones by default.
    """

    uses_ema = False
    works_on_shards = False

    def __init__(
        self, every: int, steps: int, learning_rate: float = 1e-4, parameters: list[str] | None = None
    ) -> None:
        super().__init__(every, decay=0.0, parameters=parameters)
        if not 1 <= steps <= every:
            raise UserError(f"IteratedLearning: steps must be between 1 and every ({every}), got {steps}")
        if not learning_rate > 0:
            raise UserError(f"IteratedLearning: learning_rate must be above 0, got {learning_rate}")
        self.steps, self.learning_rate = steps, learning_rate
        self.seen: deque[Any] = deque(maxlen=steps)  # the batches that the student will learn from
        self.targets: list[Any] = []  # what the teacher says to them
        self._seen_before: list[Any] = []  # those of a checkpoint, as plain lists
        self.earlier: dict[str, Tensor] = {}  # the online weights at the start of this generation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not hasattr(pl_module, "imitation_losses"):
            raise UserError(f"IteratedLearning needs a module that imitates; {type(pl_module).__name__} does not")

    def clear(self) -> None:
        super().clear()
        self.seen.clear()
        self.earlier.clear()
        self._seen_before = []

    def add(self, weights: Weights) -> None:
        super().add(weights)
        self.earlier |= clone(weights)

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        super().restore(trainer, state)
        if "earlier" not in state:
            return
        copy_(self.earlier, state["earlier"])
        seen = state.get("seen", [])
        if len(seen) != trainer.world_size:
            raise UserError(
                f"IteratedLearning goes on with as many processes as it was saved with: {len(seen)}, and not "
                f"{trainer.world_size}"
            )
        self._seen_before = seen[trainer.global_rank]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._seen_before:
            self.seen.extend(_shaped(plain, batch) for plain in self._seen_before)
            self._seen_before = []
        self.seen.append(batch)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def before_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # While the online model is still the teacher.
        self.targets = [pl_module.imitation_targets(batch) for batch in self.seen]

    def reset(self) -> None:
        copy_(self.online, self.earlier)

    def after_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = torch.optim.AdamW(self.online.values(), lr=self.learning_rate, weight_decay=0.0)
        values: list[float] = []
        for batch, targets in zip(self.seen, self.targets, strict=True):
            values += self._learn(trainer, optimizer, pl_module.imitation_losses(batch, targets))
        self.targets = []
        copy_(self.earlier, self.online)
        log(trainer, pl_module, {"imitation/first_loss": values[0], "imitation/last_loss": values[-1]})

    def _learn(self, trainer: Trainer, optimizer: torch.optim.Optimizer, losses: Iterator[Tensor]) -> list[float]:
        """One optimizer step a loss; their values."""
        values = []
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            for loss in losses:
                optimizer.zero_grad()
                loss.backward()
                if trainer.world_size > 1:
                    for parameter in self.online.values():
                        if parameter.grad is not None:
                            parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
                optimizer.step()
                values.append(mean_of_ranks(loss.item()))
        optimizer.zero_grad()
        return values

    def own_state(self) -> dict[str, Any]:
        state = super().own_state()
        if self.earlier:
            state["earlier"] = clone(self.earlier)
            state["seen"] = objects_of_ranks(self._seen_before or [_plain(batch) for batch in self.seen])
        return state


def _plain(batch: Any) -> Any:
    """Named tuples as lists: a checkpoint loads with ``weights_only=True``. On the CPU, as other ranks read it."""
    if isinstance(batch, dict):
        return {name: _plain(part) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return [_plain(part) for part in batch]
    return batch.cpu() if isinstance(batch, Tensor) else batch


def _shaped(plain: Any, like: Any) -> Any:
    """The inverse of `_plain`, in the types and on the devices of another batch."""
    if isinstance(like, dict):
        return {name: _shaped(plain[name], part) for name, part in like.items()}
    if isinstance(like, tuple | list):
        parts = [_shaped(a, b) for a, b in zip(plain, like, strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)
    return plain.to(like.device) if isinstance(plain, Tensor) else plain
