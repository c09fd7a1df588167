"""Which weights take part in a weight callback."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from elastic_lightning.callbacks.weight_store import Weights
from elastic_lightning.errors import UserError


class Members:
    """The weights of a module that take part.

    They are those of ``pl_module.shadowed_parameters()`` where it has such a method, else all parameters: of them what
    is trainable, and chosen by the patterns. With `buffers`, the module's buffers of floating-point numbers too.

    Args:
        owner: for messages.
        patterns: such as ``sender.*``; None chooses all.
        buffers: whether buffers take part.
    """

    def __init__(self, owner: str, patterns: list[str] | None, buffers: bool) -> None:
        self.owner, self.patterns, self.buffers = owner, patterns, buffers
        self._buffers: dict[str, tuple[torch.nn.Module, str]] = {}  # where each is looked up: a module may replace it
        self._seen: set[Tensor] = set()  # trainable parameters that were considered

    def forget(self) -> None:
        """Another module comes."""
        self._buffers, self._seen = {}, set()

    def select(self, pl_module: LightningModule, also: Iterable[str] = ()) -> Weights:
        """Those that take part now, and parameters that are called for by name, such as by a checkpoint.

        Raises:
            UserError: a pattern matches nothing, or nothing is trainable.
        """
        self._buffers = _float_buffers(pl_module) if self.buffers else {}
        named = weights_of(pl_module)
        self._check_patterns([*named, *self._buffers])
        chosen = {name: tensor for name, tensor in named.items() if tensor.requires_grad and self._matches(name)}
        if not chosen:
            raise UserError(f"{self.owner} finds no trainable parameters (parameters: {self.patterns})")
        self._seen.update(tensor for tensor in named.values() if tensor.requires_grad)
        self._buffers = {name: place for name, place in self._buffers.items() if self._matches(name)}
        return chosen | {name: named[name] for name in also if name in named} | self.buffers_now()

    def buffers_now(self) -> Weights:
        """The buffers that take part, as they are at this moment."""
        return {name: getattr(owner, attribute) for name, (owner, attribute) in self._buffers.items()}

    def unseen(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer trains weights that were frozen, or not there, when they were last looked for."""
        new = {weight for weight in _weights_of(optimizer) if weight.requires_grad} - self._seen
        self._seen |= new
        return bool(new)

    def moved_by(self, optimizer: Optimizer, online: Weights) -> list[str]:
        """Names of the weights that a step of this optimizer moves: its own, and buffers beside them."""
        own = set(_weights_of(optimizer))
        parameters = {name: tensor in own for name, tensor in online.items() if name not in self._buffers}
        moved = [name for name, is_own in parameters.items() if is_own]
        return moved + [name for name in self._buffers if _any_beside(name, parameters)] if moved else []

    def _matches(self, name: str) -> bool:
        return self.patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in self.patterns)

    def _check_patterns(self, names: list[str]) -> None:
        for pattern in self.patterns or ():
            if not fnmatch.filter(names, pattern):
                raise UserError(
                    f"{self.owner} finds no trainable parameters for the pattern {pattern!r} (parameters: "
                    f"{self.patterns}); names are such as {names[0]}"
                )


class BufferWatch:
    """Says once, after the first batch of a fit, that training changes buffers which take no part."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._before: Weights = {}

    def start(self, pl_module: LightningModule) -> None:
        """Remember the buffers of floating-point numbers in submodules in training mode."""
        places = _float_buffers(pl_module)
        self._before = {name: getattr(*place).clone() for name, place in places.items() if place[0].training}

    def look(self, pl_module: LightningModule) -> None:
        """Warn where one of them is no longer what it was; afterwards none is looked at."""
        before, self._before = self._before, {}
        now = dict(pl_module.named_buffers()) if before else {}
        changed = [name for name, old in before.items() if name in now and not torch.equal(now[name].to(old), old)]
        if changed:
            rank_zero_warn(
                f"{self.owner}: training changes buffers such as {changed[0]}, which are neither averaged nor reset "
                "with the weights beside them: `buffers: true` takes them along"
            )


def are_of(pl_module: LightningModule, weights: Iterable[Tensor]) -> bool:
    """Whether weights, of which there are some, are this module's own parameters."""
    own, weights = set(pl_module.parameters()), [w for w in weights if isinstance(w, torch.nn.Parameter)]
    return bool(weights) and own.issuperset(weights)


def weights_of(pl_module: LightningModule) -> Weights:
    """The weights of a module by the names that callbacks know them by, trainable or not."""
    shadowed = getattr(pl_module, "shadowed_parameters", None)
    return shadowed() if shadowed is not None else dict(pl_module.named_parameters())


def _float_buffers(pl_module: LightningModule) -> dict[str, tuple[torch.nn.Module, str]]:
    found = {}
    for name, tensor in pl_module.named_buffers():
        path, _, attribute = name.rpartition(".")
        if tensor.is_floating_point() or tensor.is_complex():
            found[name] = (pl_module.get_submodule(path), attribute)
    return found


def _weights_of(optimizer: Optimizer) -> Iterable[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])


def _any_beside(buffer: str, parameters: dict[str, bool]) -> bool:
    """Whether a step moved parameters of the innermost module around a buffer that has any that take part."""
    path = buffer
    while path:
        path = path.rpartition(".")[0]
        beside = [moved for name, moved in parameters.items() if name.startswith(f"{path}." if path else "")]
        if beside:
            return any(beside)
    return False
