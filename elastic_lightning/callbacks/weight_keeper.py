"""The base of callbacks that keep sets of a module's weights, over fits and checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from elastic_lightning.callbacks.weight_members import Members, are_of
from elastic_lightning.callbacks.weight_state import LoadedState, load_sets, saved_names, sets_to_save
from elastic_lightning.callbacks.weight_store import Weights, WeightStore
from elastic_lightning.callbacks.weight_telemetry import ResetTelemetry
from elastic_lightning.errors import UserError
from elastic_lightning.functional.weights import bit_sums
from elastic_lightning.ranks import any_rank

SHOWN = 3  # names in a message


class WeightKeeper(Callback):
    """Knows of which module its sets are, where each of them began, and what of them a checkpoint keeps.

    Args:
        decay: of the average; None keeps none.
        keeps_initial: whether theta_0 is kept.
        parameters: patterns such as ``sender.*`` that select among the names; all by default.
        offload: keep the sets in CPU memory.
        buffers: whether buffers of floating-point numbers take part.

    Attributes:
        online, ema, initial, reference: the sets, each a dict from name to tensor; see `WeightStore`.
        batches: training batches seen.
        updates: steps of the average, be it of a part of the weights.
        resets: so far.
    """

    moves_reference = False

    def __init__(
        self, decay: float | None, keeps_initial: bool, parameters: list[str] | None, offload: bool, buffers: bool
    ) -> None:
        self.parameters, self.offload, self.buffers = parameters, offload, buffers
        self.batches = self.updates = self.resets = 0
        self.store = WeightStore(decay, keeps_initial, offload)
        self.online, self.ema = self.store.online, self.store.ema
        self.initial, self.reference = self.store.initial, self.store.reference
        self._members = Members(type(self).__name__, parameters, buffers)
        self._telemetry = ResetTelemetry(parameters)
        self._loaded = LoadedState()
        self._ended_with: dict[str, int] | None = None  # sums over the online weights

    # Where a fit begins ------------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what a checkpoint said, go on where the last fit of this module ended, or start anew."""
        self.store.reshard(pl_module)
        state = self._loaded.take(pl_module)
        if state or not self._goes_on(pl_module):
            self.clear()
        self._ended_with = None
        self._take_up(trainer, pl_module, self._members.select(pl_module, also=saved_names(state)))
        self.store.to_device()
        if state:
            self.restore(trainer, state)

    def end(self) -> None:
        """A fit is over: remember with which weights, for the next one goes on where it ended."""
        self._ended_with = bit_sums(self.online)

    def join(self, pl_module: LightningModule) -> None:
        """Take up what became trainable since the fit began, and say so."""
        self.store.settle()
        joined = self._take_up(pl_module.trainer, pl_module, self._members.select(pl_module))
        if joined:
            shown = ", ".join(joined[:SHOWN]) + ", ..." * (len(joined) > SHOWN)
            name = type(self).__name__
            pl_module.print(f"{name}: {len(joined)} weights join, theta_0 is what they are now: {shown}")

    def clear(self) -> None:
        """Forget all weights, and set the clock to 0."""
        self.batches = self.updates = self.resets = 0
        self._telemetry.watched = {}
        self.store.clear()
        self._members.forget()

    def add(self, weights: Weights) -> None:
        """Take up weights that are new, as they are now."""
        self.store.add(weights)

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state; the weights that it knows are there."""
        self.batches, self.updates, self.resets = state["batches"], state["updates"], state["resets"]
        self._telemetry.watched = state.get("watched", {})
        load_sets(self.store, state)

    def _goes_on(self, pl_module: LightningModule) -> bool:
        """Whether the sets are of this module, and its weights those that its last fit ended with."""
        if not are_of(pl_module, self.online.values()):
            return False
        changed = self._ended_with is not None and bit_sums(self.online) != self._ended_with
        if any_rank(torch.tensor(changed)):
            rank_zero_warn(
                f"{type(self).__name__}: the weights are not those that the last fit ended with: average, theta_0 and "
                "clock start anew"
            )
            return False
        return True

    def _take_up(self, trainer: Trainer, pl_module: LightningModule, weights: Weights) -> list[str]:
        """Add what is not there yet, and return its names. The reference is looked at as it is by now."""
        new = {name: tensor for name, tensor in weights.items() if name not in self.online}
        reference = getattr(pl_module, "reference_weights", lambda: None)() or {}
        lacking = next((name for name in (*self.online, *new) if name not in reference), None)
        if self.moves_reference and lacking is not None:
            raise UserError(
                f"{type(self).__name__} moves the reference policy, and this module has none to move for {lacking}: "
                "use a module with `reference: frozen_copy`, and `parameters` that it holds"
            )
        moved = any(getattr(callback, "moves_reference", False) for callback in trainer.callbacks)
        self.store.refer_to(reference, fixed=not moved)
        if new:
            self.add(new)
        return list(new)

    # Checkpoints ------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state: two callbacks of one class are told apart by their parameters."""
        return super().state_key if self.parameters is None else self._generate_state_key(parameters=self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Counters and every set that cannot be had from elsewhere."""
        return self._loaded.state or self.own_state()  # what was loaded is of the weights that the module has by now

    def own_state(self) -> dict[str, Any]:
        """What `restore` takes up."""
        self.store.settle()
        counters = {"batches": self.batches, "updates": self.updates, "resets": self.resets}
        watched = {"watched": self._telemetry.watched}  # of the last batch: the next run logs what came after
        return counters | watched | sets_to_save(self.store, self.moves_reference)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded.expect(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded.state = state_dict
