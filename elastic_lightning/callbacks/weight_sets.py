"""The base of all callbacks that move weights between four named sets: initial, reference, ema, online."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from elastic_lightning.callbacks.offload import OffloadedAverage
from elastic_lightning.callbacks.stopwatch import Stopwatch
from elastic_lightning.errors import UserError
from elastic_lightning.functional import copy_, distance, first_not_finite, float32_copy, lerp_
from elastic_lightning.ranks import alike

UpdateOn = Literal["optimizer_step", "batch"]
FLAT_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy")


class WeightSets(Callback):
    """Keeps an exponential moving average of the online weights and, every so many batches, calls `reset`.

    The weights are those of ``pl_module.shadowed_parameters()`` where the module has such a method (a policy without
    its value head), else all trainable parameters. The average is float32 whatever the parameters are: in bfloat16 a
    step of 0.005 rounds to nothing. Everything is in place, so the optimizer keeps its state and its tensors.

    A batch that the module skipped (it says so in `batch_skipped`) counts, and leaves the average where it was.

    Subclasses override `reset` (and, to follow the average, `after_update`), and may override `before_reset` and
    `after_reset`. Other callbacks and the module itself are told too: their methods ``on_before_reset(trainer,
    pl_module)`` and ``on_after_reset(trainer, pl_module)`` are called where they have them.

    Args:
        decay: of the average: ``ema = decay * ema + (1 - decay) * online``.
        every: training batches between resets; None never resets.
        update_on: move the average after each optimizer step or after each training batch.
        parameters: patterns such as ``sender.*`` that select among the names; all by default.
        offload: keep the sets in CPU memory, pinned on CUDA, and move the average there beside the training; it takes
            one more copy of the weights there, in their own type.

    Attributes:
        seconds: spent inside updates and resets during the last training batch; of an offloaded average, what the
            training thread spent on it.
    """

    uses_ema = True
    uses_initial = False
    moves_reference = False
    works_on_shards = True

    def __init__(
        self,
        decay: float,
        every: int | None,
        update_on: UpdateOn = "optimizer_step",
        parameters: list[str] | None = None,
        offload: bool = False,
    ) -> None:
        if not 0 <= decay <= 1:
            raise UserError(f"{type(self).__name__}: decay must be in [0, 1], got {decay}")
        if every is not None and every < 1:
            raise UserError(f"{type(self).__name__}: every must be 1 or more training batches, got {every}")
        if update_on not in ("optimizer_step", "batch"):
            raise UserError(f"{type(self).__name__}: update_on must be optimizer_step or batch, got {update_on!r}")
        self.decay, self.every, self.update_on, self.parameters = decay, every, update_on, parameters
        self.offload = offload
        self.seconds = 0.0
        self.batches = 0  # training batches seen
        self.updates = 0  # of the average
        self.resets = 0
        self.online: dict[str, Tensor] = {}
        self.ema: dict[str, Tensor] = {}
        self.initial: dict[str, Tensor] = {}
        self.reference: dict[str, Tensor] = {}
        self._initial_own: dict[str, Tensor] = {}  # those of `initial` that no reference holds
        self._loaded: dict[str, Any] = {}
        self._handles: list[Any] = []
        self._watched: dict[str, float] = {}
        self._stopwatch = Stopwatch()
        self._offloaded: OffloadedAverage | None = None

    # To override ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Move weights; called at the end of batch every, 2 * every, ..."""

    def after_update(self) -> None:
        """Called after each update of the average."""

    def before_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called right before `reset`."""

    def after_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called right after `reset`."""

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state: two callbacks of one class are told apart by their parameters."""
        return super().state_key if self.parameters is None else self._generate_state_key(parameters=self.parameters)

    # The sets ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = type(trainer.strategy).__name__
        if stage == "fit" and name in FLAT_STRATEGIES:
            raise UserError(
                f"{type(self).__name__} does not work with {name}, which keeps parameters in flat ones without names; "
                "use ddp or ModelParallelStrategy"
            )
        if stage == "fit" and name == "ModelParallelStrategy" and (self.offload or not self.works_on_shards):
            what = f"{type(self).__name__}{' with offload' if self.works_on_shards else ''}"
            raise UserError(f"{what} does not work with {name}, which shards parameters; use ddp")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The one hook that runs after placement and after a checkpoint was restored, on every strategy.
        self.online = self._select(pl_module)
        self.reference = self._reference(pl_module)
        if self.uses_ema:
            self.ema = self._placed(float32_copy(self.online))
        if self.uses_initial:
            moved = any(getattr(callback, "moves_reference", False) for callback in trainer.callbacks)
            held = {} if moved else self.reference
            self._initial_own = self._placed(_clone({n: p for n, p in self.online.items() if n not in held}))
            self.initial = {name: held[name] if name in held else self._initial_own[name] for name in self.online}
        self._restore()
        if self.offload and self.uses_ema:
            self._offloaded = OffloadedAverage(self.online, self.ema, 1 - self.decay)
        if self.uses_ema:
            for optimizer in trainer.optimizers:
                self._follow(optimizer, pl_module)

    def _follow(self, optimizer: Optimizer, pl_module: LightningModule) -> None:
        """Have an optimizer that moves the online weights move their average too, but in a step that is skipped."""
        own = {id(parameter) for parameter in self.online.values()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            return
        if self._offloaded is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._offloaded.before_step))
        if self.update_on == "optimizer_step":

            def update(*_: Any) -> None:
                if not getattr(pl_module, "batch_skipped", False):
                    self.update()

            self._handles.append(optimizer.register_step_post_hook(update))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._offloaded is not None:
            self._offloaded.close()
            self._offloaded = None

    def _placed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.offload:
            return weights
        on_cpu = {name: tensor.cpu() for name, tensor in weights.items()}
        cuda = self._device.type == "cuda"
        return {name: tensor.pin_memory() if cuda else tensor for name, tensor in on_cpu.items()}

    def _select(self, pl_module: LightningModule) -> dict[str, Tensor]:
        shadowed = getattr(pl_module, "shadowed_parameters", None)
        named = shadowed() if shadowed is not None else dict(pl_module.named_parameters())
        named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        if self.parameters is not None:
            patterns = self.parameters
            named = {n: p for n, p in named.items() if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)}
        if not named:
            raise UserError(f"{type(self).__name__} finds no trainable parameters (parameters: {self.parameters})")
        return named

    def _reference(self, pl_module: LightningModule) -> dict[str, Tensor]:
        weights = getattr(pl_module, "reference_weights", lambda: None)() or {}
        held = {name: weights[name] for name in self.online if name in weights}
        if self.moves_reference and len(held) < len(self.online):
            example = next(name for name in self.online if name not in held)
            raise UserError(
                f"{type(self).__name__} moves the reference policy, and this module has none to move for {example}: "
                "use a module with `reference: frozen_copy`, and `parameters` that it holds"
            )
        return held

    # Updates and resets -----------------------------------------------------------------------------------------

    def update(self) -> None:
        """One step of the average."""
        with self._stopwatch.running(self._device):
            if self._offloaded is None:
                lerp_(self.ema, self.online, 1 - self.decay)
            else:
                self._offloaded.update()
            self.updates += 1
            if type(self).after_update is not WeightSets.after_update:
                self.settle()
                self.after_update()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        skipped = getattr(pl_module, "batch_skipped", False)
        if self._watched and not skipped:
            after = {f"{self._tag}/{name}_after": value for name, value in _watch(trainer).items()}
            self._log(trainer, pl_module, after)
            self._watched = {}
        if self.uses_ema and self.update_on == "batch" and not skipped:
            self.update()
        if self.every is not None and self.batches % self.every == 0:
            self._reset(trainer, pl_module)
        self.seconds = self._stopwatch.read()
        if hasattr(pl_module, "ppo_step"):
            self._log(trainer, pl_module, {f"time/{type(self).__name__}_seconds": self.seconds})

    @property
    def _device(self) -> torch.device:
        return next(iter(self.online.values())).device

    def settle(self) -> None:
        """Wait for an offloaded average to take its last step; after that it can be read."""
        if self._offloaded is not None:
            self._offloaded.wait()

    def on_before_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle()  # another callback is about to move the weights that an offloaded average may still be reading

    @property
    def next_reset(self) -> int | None:
        """Training batches until the next reset; None where there is none."""
        return None if self.every is None else self.every - self.batches % self.every

    def _reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle()
        alike(self._check_average)
        self.before_reset(trainer, pl_module)
        _tell(trainer, pl_module, "on_before_reset")
        before = self._distance()
        with self._stopwatch.running(self._device):
            self.reset()
        self.resets += 1
        self._watched = _watch(trainer)
        telemetry = {"count": float(self.resets)}
        if before is not None:
            telemetry |= {"distance_before": before, "distance_after": self._distance()}
        telemetry |= {f"{name}_before": value for name, value in self._watched.items()}
        self._log(trainer, pl_module, {f"{self._tag}/{name}": value for name, value in telemetry.items()})
        self.after_reset(trainer, pl_module)
        _tell(trainer, pl_module, "on_after_reset")

    def _check_average(self) -> None:
        name = first_not_finite(self.ema)
        if name is not None:
            raise UserError(
                f"{type(self).__name__}: the average of {name} is not finite after batch {self.batches}, and not used: "
                "lower the learning rate, and go on from the last checkpoint"
            )

    @property
    def _tag(self) -> str:
        return "reset" if self.parameters is None else f"reset[{','.join(self.parameters)}]"

    def _distance(self) -> float | None:
        """L2 distance of the online weights to the initial ones, where those are kept."""
        return distance(self.online, self.initial).item() if self.initial else None

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        step = getattr(pl_module, "ppo_step", self.batches)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    @contextmanager
    def average_weights(self) -> Iterator[None]:
        """Within this context the online weights are the average; they come back whatever happens inside."""
        self.settle()
        saved = _clone(self.online)
        copy_(self.online, self.ema)
        try:
            yield
        finally:
            copy_(self.online, saved)

    # State ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and every set that cannot be had from elsewhere; the frozen reference can."""
        self.settle()
        state: dict[str, Any] = {"batches": self.batches, "updates": self.updates, "resets": self.resets}
        state["watched"] = self._watched  # of a reset on the last batch: the next run logs what came after
        if self.ema:
            state["ema"] = _whole(self.ema)
        if self._initial_own:
            state["initial"] = _whole(self._initial_own)
        if self.moves_reference and self.reference:
            state["reference"] = _whole(self.reference)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict  # the weights have no place yet: on_train_start puts them there

    def _restore(self) -> None:
        state, self._loaded = self._loaded, {}
        if not state:
            return
        self.batches, self.updates, self.resets = state["batches"], state["updates"], state["resets"]
        self._watched = state.get("watched", {})
        own = {"ema": self.ema, "initial": self._initial_own, "reference": self.reference}
        for name, weights in own.items():
            if name in state:
                try:
                    copy_(weights, state[name])
                except (ValueError, RuntimeError) as error:
                    raise UserError(f"the checkpoint's {name} weights are of another model: {error}") from error


def _clone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies for a checkpoint that any number of ranks can load: of what is sharded the whole, on the CPU."""
    return {
        name: tensor.detach().full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor.detach().clone()
        for name, tensor in weights.items()
    }


def _watch(trainer: Trainer) -> dict[str, float]:
    """Reward and KL of the last training batch, where the module logs them."""
    names = {"reward": "train/reward", "kl": "train/kl"}
    metrics = trainer.callback_metrics
    return {short: float(metrics[name]) for short, name in names.items() if name in metrics}


def _tell(trainer: Trainer, pl_module: LightningModule, hook: str) -> None:
    for listener in (*trainer.callbacks, pl_module):
        method = getattr(listener, hook, None)
        if method is not None:
            method(trainer, pl_module)
