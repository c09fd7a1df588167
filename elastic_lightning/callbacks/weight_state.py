"""What a checkpoint keeps of a store of weights."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule
from torch import Tensor

from elastic_lightning.callbacks.weight_members import are_of
from elastic_lightning.callbacks.weight_store import Weights, WeightStore, part
from elastic_lightning.errors import UserError
from elastic_lightning.functional import copy_

SETS = ("ema", "initial", "reference")


class LoadedState:
    """The state of a callback that a checkpoint brought, until the weights of the module that it is of have a place."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self._of: Tensor | None = None  # a parameter of that module

    def expect(self, pl_module: LightningModule) -> None:
        """A checkpoint is loaded into this module: what came before it is of weights that are gone."""
        self.state, self._of = {}, next(pl_module.parameters(), None)

    def take(self, pl_module: LightningModule) -> dict[str, Any]:
        """The state, if it is of this module; once."""
        (state, of), self.state, self._of = (self.state, self._of), {}, None
        return state if of is None or are_of(pl_module, [of]) else {}


def sets_to_save(store: WeightStore, moves_reference: bool) -> dict[str, Weights]:
    """Every set that cannot be had from elsewhere; a frozen reference can."""
    own = {"ema": store.ema, "initial": store.copies, "reference": store.reference if moves_reference else {}}
    return {name: whole(weights) for name, weights in own.items() if weights}


def saved_names(state: dict[str, Any]) -> set[str]:
    """Names of the weights that a state was saved of, as far as it holds any."""
    return {name for weights in SETS for name in state.get(weights, {})}


def load_sets(store: WeightStore, state: dict[str, Any]) -> None:
    """Put saved weights into a store that holds those names already.

    Raises:
        UserError: a name or a shape is of another model.
    """
    own = {"ema": store.ema, "initial": store.copies, "reference": store.reference}
    for name, weights in own.items():
        saved = state.get(name, {})
        if name == "initial":  # what a reference that nothing moves holds now is theta_0 as well
            saved = {key: value for key, value in saved.items() if key in weights or key not in store.initial}
        try:
            copy_(part(weights, weights.keys() & saved.keys()), saved)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the checkpoint's {name} weights are of another model: {error}") from error


def whole(weights: Weights) -> Weights:
    """Copies for a checkpoint that any number of ranks can load: of what is sharded the whole, on the CPU."""
    return {
        name: tensor.detach().full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor.detach().clone()
        for name, tensor in weights.items()
    }
