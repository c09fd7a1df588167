"""A small store of named weights: initial, reference, ema and online."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from elastic_lightning.callbacks.offload import OffloadedAverage
from elastic_lightning.functional import copy_, distance, first_not_finite, float32_copy, lerp_

Weights = dict[str, Tensor]


class WeightStore:
    """Four sets of a module's weights, each a dict by name. All arithmetic is in place.

    Args:
        decay: of the average; None keeps none.
        keeps_initial: whether theta_0 is kept.
        offload: keep what is ours in CPU memory, pinned on CUDA, and move the average there beside the training.

    Attributes:
        online: the module's own tensors, which are trained.
        ema: their average, float32, or float64 and complex where they are.
        initial: theta_0: the tensors of a reference that nothing moves, and `copies` of what it does not hold.
        copies: those of `initial` that are ours.
        reference: the module's reference policy, by the names of `online`; empty where it has none to show.
    """

    def __init__(self, decay: float | None, keeps_initial: bool, offload: bool) -> None:
        self.decay, self.keeps_initial, self.offload = decay, keeps_initial, offload
        self.online: Weights = {}
        self.ema: Weights = {}
        self.initial: Weights = {}
        self.copies: Weights = {}
        self.reference: Weights = {}
        self._sharded: list[torch.nn.Module] = []
        self._held: Weights = {}  # all of the module's reference
        self._fixed = True
        self._offloaded: OffloadedAverage | None = None

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(iter(self.online.values())).device

    def reshard(self, module: torch.nn.Module | None = None) -> None:
        """Have FSDP2 let go of weights that it has gathered, in this module or the last one that was given.

        After a forward pass without a backward one it goes on with gathered copies: changes of the shards, which are
        what an optimizer and these sets hold, would not be seen, and a module would show the copies as its parameters.
        """
        if module is not None:
            self._sharded = [m for m in module.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]
        for sharded in self._sharded:
            sharded.reshard()

    def clear(self) -> None:
        """Forget everything."""
        for weights in (self.online, self.ema, self.initial, self.copies, self.reference):
            weights.clear()
        self._held = {}

    def refer_to(self, reference: Weights, fixed: bool) -> None:
        """Look at the module's reference. While nothing moves it, it is theta_0, and needs no copy of ours."""
        self._held, self._fixed = reference, fixed
        held = {name: reference[name] for name in self.online if name in reference}
        self.reference.update(held)
        self._begin_with({name: tensor for name, tensor in held.items() if name not in self.copies})

    def add(self, weights: Weights) -> None:
        """Take up weights as they are now: with these values their average begins, and, where no reference holds it,
        theta_0."""
        self.online.update(weights)
        if self.decay is not None:
            self.ema.update(self._placed(float32_copy(weights)))
        self.reference.update({name: self._held[name] for name in weights if name in self._held})
        self._begin_with(weights | part(self.reference, weights.keys() & self.reference.keys()))

    def _begin_with(self, theta_0: Weights) -> None:
        if not self.keeps_initial:
            return
        fixed = {name: tensor for name, tensor in theta_0.items() if self._fixed and name in self._held}
        self.copies.update(self._placed(clone({n: tensor for n, tensor in theta_0.items() if n not in fixed})))
        self.initial.update(fixed)
        self.initial.update(self.copies)

    def to_device(self) -> None:
        """Follow the module to another device."""
        if not self.offload:
            for own in (self.ema, self.copies):
                own.update({name: tensor.to(self.online[name].device) for name, tensor in own.items()})
            self.initial.update(self.copies)

    # The average -------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Have the thread of an offloaded average ready."""
        if self.offload and self.decay is not None:
            self._offloaded = OffloadedAverage(self.online, self.ema, 1 - self.decay)

    def close(self, failed: bool = False) -> None:
        """End that thread; where something has `failed` already, without a word on what went wrong in it."""
        if self._offloaded is not None:
            offloaded, self._offloaded = self._offloaded, None
            offloaded.close(failed)

    def move_average(self, names: Iterable[str]) -> None:
        """One step of the average of these weights towards them."""
        if self._offloaded is not None:
            self._offloaded.update(names)
        else:
            lerp_(part(self.ema, names), part(self.online, names), 1 - self.decay)

    def first_not_finite(self) -> str | None:
        """The name of an average that holds NaN or infinity."""
        return first_not_finite(self.ema)

    def settle(self) -> None:
        """Wait for an offloaded average to take its last step; after that it can be read."""
        if self._offloaded is not None:
            self._offloaded.wait()

    def before_step(self) -> None:
        """The weights are about to change on their device: they must have been copied before."""
        if self._offloaded is not None:
            self._offloaded.before_step()

    @contextmanager
    def average_weights(self) -> Iterator[None]:
        """Within this context the online weights are the average; they come back whatever happens inside."""
        self.settle()
        self.reshard()
        saved = clone(self.online)
        copy_(self.online, self.ema)
        try:
            yield
        finally:
            self.reshard()
            copy_(self.online, saved)

    def depth(self) -> float | None:
        """L2 distance of the online parameters to theta_0, where that is kept; buffers do not count."""
        names = [name for name, tensor in self.online.items() if isinstance(tensor, torch.nn.Parameter)]
        return distance(part(self.online, names), part(self.initial, names)).item() if self.initial else None

    def _placed(self, weights: Weights) -> Weights:
        if not self.offload:
            return weights
        return {name: t.cpu().pin_memory() if t.is_cuda else t for name, t in weights.items()}


def clone(weights: Weights) -> Weights:
    """Detached copies."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def part(weights: Weights, names: Iterable[str]) -> Weights:
    """Those of the weights that have these names."""
    return {name: weights[name] for name in names}
