"""When an average moves: what the optimizers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Trainer
from torch.optim import Optimizer


class StepHooks:
    """Two functions around each step of optimizers, however it is taken: ``before`` and ``after``."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def attach(
        self, optimizers: list[Optimizer], before: Callable[[Optimizer], None], after: Callable[[Optimizer], None]
    ) -> None:
        """Call them from now on, and whatever was attached before no more."""
        self.detach()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(lambda stepping, *_: before(stepping)))
            self._handles.append(optimizer.register_step_post_hook(lambda stepping, *_: after(stepping)))

    def detach(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class StepsTaken:
    """Which steps of a batch moved anything.

    A gradient scaler leaves out steps whose gradient is infinite: an optimizer of its own accord is then not called,
    and a fused one is, but does nothing. Where `training_step` returns None, Lightning calls it without gradients.
    """

    def __init__(self) -> None:
        self.tried = self.taken = 0
        self._empty = False

    @property
    def none(self) -> bool:
        """Whether steps were tried since the last batch, and all of them left out."""
        return self.tried > 0 and self.taken == 0

    def try_one(self, optimizer: Optimizer) -> None:
        """A step is about to be taken; its gradients are there."""
        self.tried += 1
        self._empty = all(weight.grad is None for group in optimizer.param_groups for weight in group["params"])

    def took(self, optimizer: Optimizer) -> bool:
        """After a step: whether it moved anything."""
        found, empty, self._empty = getattr(optimizer, "found_inf", None), self._empty, False
        moved = not empty and (found is None or not found.item())
        self.taken += moved
        return moved

    def next_batch(self) -> None:
        """Begin to count anew."""
        self.tried = self.taken = 0
        self._empty = False


def drop_gradients(trainer: Trainer) -> None:
    """Forget gradients that wait for the rest of an accumulation window: the weights they are of are gone."""
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
