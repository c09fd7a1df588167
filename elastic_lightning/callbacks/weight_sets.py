"""The base of all callbacks that move weights between four named sets: initial, reference, ema, online."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

from lightning import LightningModule, Trainer
from torch.optim import Optimizer

from elastic_lightning.callbacks.stopwatch import Stopwatch
from elastic_lightning.callbacks.weight_keeper import WeightKeeper
from elastic_lightning.callbacks.weight_members import BufferWatch
from elastic_lightning.callbacks.weight_steps import StepHooks, StepsTaken, drop_gradients
from elastic_lightning.callbacks.weight_telemetry import log, reward_and_kl
from elastic_lightning.errors import UserError
from elastic_lightning.ranks import alike

UpdateOn = Literal["optimizer_step", "batch"]
FLAT_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy")


class ResetState(NamedTuple):
    """What is known at the end of a training batch, the same on all ranks.

    Attributes:
        batches: training batches seen, with this one.
        updates: steps of the average.
        resets: so far.
        reward: last logged ``train/reward``; None where the module logs none.
        kl: last logged ``train/kl``, nats per response; None where the module logs none.
    """

    batches: int
    updates: int
    resets: int
    reward: float | None = None
    kl: float | None = None


class WeightSets(WeightKeeper):
    """Keeps an exponential moving average of the online weights and, every so many batches, calls `reset`.

    **Which weights.** Those of ``pl_module.shadowed_parameters()`` where the module has such a method (a policy without
    its value head), else its parameters: what is trainable of them. Parameters that become trainable later join before
    their first step, with theta_0 = their weights of that moment, and a line says so; those that are frozen later stay.
    The average is float32 whatever the parameters are (float64 and complex ones stay so): in bfloat16 a step of 0.005
    rounds to nothing. Everything is in place, so the optimizer keeps its state and its tensors.

    **When they move.** With `update_on: optimizer_step` the average of a parameter moves whenever the optimizer that
    holds it has taken a step; steps that a gradient scaler leaves out are none. With `update_on: batch` all of it moves
    once a batch, but not in one whose steps a scaler has all left out. A batch that the module skipped (it says so in
    `batch_skipped`) counts, and leaves the average where it was. A reset drops the gradients that wait for the rest of
    an accumulation window: they are of weights that are gone.

    **Several fits.** A second `fit` of the same module goes on where the first one ended: clock, average and theta_0;
    where something changed the weights in between, it starts anew, and a line says so. Another module has a clock of
    its own, from 0. A checkpoint that is loaded, be it to be measured, brings its sets and its clock.

    **What a subclass decides.** `reset` moves weights; `should_reset` and `should_update` say when; `after_update`
    follows the average; `before_reset` and `after_reset` stand around a reset. Other callbacks and the module are told
    too: their ``on_before_reset(trainer, pl_module)`` and ``on_after_reset(...)`` are called where they have them.

    Args:
        every: training batches between resets; None never resets, where `should_reset` does not say otherwise.
        decay: of the average: ``ema = decay * ema + (1 - decay) * online``.
        update_on: move the average after each optimizer step or after each training batch.
        parameters: patterns such as ``sender.*`` that select among the names; all by default.
        offload: keep the sets in CPU memory, pinned on CUDA, and move the average there beside the training; it takes
            one more copy of the weights there, in their own type.
        buffers: average and reset buffers of floating-point numbers too, such as BatchNorm's running statistics. They
            move with the optimizer of the parameters beside them. Without it they stay those of the online weights
            over a reset, and a warning says so where training changes any.

    Attributes:
        seconds: spent inside updates and resets during the last training batch; of an offloaded average, what the
            training thread spent on it.
    """

    uses_ema = True
    uses_initial = False
    moves_online = True
    works_on_shards = True

    def __init__(
        self,
        every: int | None,
        decay: float = 0.995,
        update_on: UpdateOn = "optimizer_step",
        parameters: list[str] | None = None,
        offload: bool = False,
        buffers: bool = False,
    ) -> None:
        name = type(self).__name__
        if not 0 <= decay <= 1:
            raise UserError(f"{name}: decay must be in [0, 1], got {decay}")
        if every is not None and every < 1:
            raise UserError(f"{name}: every must be 1 or more training batches, got {every}")
        if update_on not in ("optimizer_step", "batch"):
            raise UserError(f"{name}: update_on must be optimizer_step or batch, got {update_on!r}")
        super().__init__(decay if self.uses_ema else None, self.uses_initial, parameters, offload, buffers)
        self.decay, self.every, self.update_on = decay, every, update_on
        self.seconds = 0.0
        self._hooks, self._steps = StepHooks(), StepsTaken()
        self._stopwatch = Stopwatch()
        self._buffer_watch = BufferWatch(name)

    # To override ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Move weights; called at the end of a batch for which `should_reset` is true."""

    def should_reset(self, state: ResetState) -> bool:
        """Whether to reset at the end of this training batch: by default after batch every, 2 * every, ...

        Asked once a batch, on every rank; all must answer alike, as they do from what `state` holds.
        """
        return self.every is not None and state.batches % self.every == 0

    def should_update(self, moment: UpdateOn) -> bool:
        """Whether the average moves after an optimizer step, or at the end of a batch."""
        return self.update_on == moment

    def after_update(self) -> None:
        """Called after each update of the average."""

    def before_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called right before `reset`."""

    def after_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called right after `reset`."""

    # Hooks ------------------------------------------------------------------------------------------------------

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
        self.begin(trainer, pl_module)
        self.store.close()  # of a search for a learning rate, which trains within the start of a fit
        self.store.open()
        self._hooks.attach(trainer.optimizers, lambda o: self._before_step(pl_module, o), self._after_step(pl_module))
        if not self.buffers and self.moves_online:
            self._buffer_watch.start(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._steps.try_one(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        skipped = getattr(pl_module, "batch_skipped", False)
        if not skipped:
            self._telemetry.after_batch(trainer, pl_module)
        if self.uses_ema and self.should_update("batch") and not skipped and not self._steps.none:
            self.update()
        self._steps.next_batch()
        if self.should_reset(ResetState(self.batches, self.updates, self.resets, **reward_and_kl(trainer))):
            self._reset(trainer, pl_module)
        self._buffer_watch.look(pl_module)
        self.seconds = self._stopwatch.read()
        if hasattr(pl_module, "ppo_step"):
            log(trainer, pl_module, {f"time/{type(self).__name__}_seconds": self.seconds})

    def on_before_reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle()  # another callback is about to move the weights that an offloaded average may still be reading

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hooks.detach()  # no teardown follows
        self.store.close(failed=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._hooks.detach()
        self.store.close()

    # Updates and resets -----------------------------------------------------------------------------------------

    def _before_step(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._members.unseen(optimizer):
            self.join(pl_module)
        self.store.before_step()

    def _after_step(self, pl_module: LightningModule) -> Any:
        """What is called after a step of an optimizer."""

        def follow(optimizer: Optimizer) -> None:
            if not self.uses_ema or not self._steps.took(optimizer) or not self.should_update("optimizer_step"):
                return
            names = self._members.moved_by(optimizer, self.online)
            if names and not getattr(pl_module, "batch_skipped", False):
                self.update(names)

        return follow

    def update(self, names: Iterable[str] | None = None) -> None:
        """One step of the average, of these weights or of all."""
        self.online.update(self._members.buffers_now())
        with self._stopwatch.running(self.store.device):
            self.store.move_average(self.online if names is None else names)
            self.updates += 1
            if type(self).after_update is not WeightSets.after_update:
                self.settle()
                self.after_update()

    def settle(self) -> None:
        """Wait for an offloaded average to take its last step; after that it can be read."""
        self.store.settle()

    @property
    def next_reset(self) -> int | None:
        """Training batches until the next reset of the clock; None where there is none."""
        return None if self.every is None else self.every - self.batches % self.every

    def _reset(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle()
        alike(self._check_average)
        self.before_reset(trainer, pl_module)
        _tell(trainer, pl_module, "on_before_reset")
        self.online.update(self._members.buffers_now())
        self.store.reshard()
        before = self.store.depth()
        with self._stopwatch.running(self.store.device):
            self.reset()
        if self.moves_online:
            drop_gradients(trainer)
        self.resets += 1
        self._telemetry.reset(trainer, pl_module, self.resets, before, self.store.depth())
        self.after_reset(trainer, pl_module)
        _tell(trainer, pl_module, "on_after_reset")

    def _check_average(self) -> None:
        name = self.store.first_not_finite()
        if name is not None:
            raise UserError(
                f"{type(self).__name__}: the average of {name} is not finite after batch {self.batches}, and not used: "
                "lower the learning rate, and go on from the last checkpoint"
            )

    def average_weights(self) -> AbstractContextManager[None]:
        """Within this context the online weights are the average; they come back whatever happens inside."""
        self.online.update(self._members.buffers_now())
        return self.store.average_weights()


def _tell(trainer: Trainer, pl_module: LightningModule, hook: str) -> None:
    for listener in (*trainer.callbacks, pl_module):
        method = getattr(listener, hook, None)
        if method is not None:
            method(trainer, pl_module)
