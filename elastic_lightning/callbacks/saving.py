"""What a run leaves behind: `save_pretrained` folders and checkpoints."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.trainer import call
from torch import Tensor

from elastic_lightning.callbacks.durable import DurableCheckpointIO, sync_folder, write_whole
from elastic_lightning.callbacks.position import Position
from elastic_lightning.callbacks.run_log import flush, mark, rewind
from elastic_lightning.errors import UserError
from elastic_lightning.functional import first_not_finite
from elastic_lightning.outputs import UNSAVED, check_folder
from elastic_lightning.policies.saving import check_mergeable
from elastic_lightning.ranks import alike


class SavePretrained(Callback):
    """Writes ``<run folder>/final`` at the end and, where `monitor` is given, ``<run folder>/best`` at each new best.

    Any transformers user can load them, and the next stage starts from them.

    Args:
        monitor: the metric that decides which validation is best, e.g. ``val/reward``.
        mode: whether more or less of it is better.
        adapter: for LoRA: "merged" into the base model, or the "adapter" alone.
        folder: in place of the run folder.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        adapter: Literal["merged", "adapter"] = "merged",
        folder: str | None = None,
    ) -> None:
        self.monitor, self.mode, self.adapter, self.folder = monitor, mode, adapter, folder
        self.best: float | None = None
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the state: several write to folders of their own."""
        return super().state_key if self.folder is None else self._generate_state_key(folder=self.folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.adapter == "merged":
            check_mergeable(pl_module)  # now, not after hours of training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self.folder or trainer.log_dir  # asked on every rank, for the first one tells the others
        alike(lambda: self._check_free(trainer, folder))  # here, for sharded runs read their checkpoints late

    def _check_free(self, trainer: Trainer, folder: str | None) -> None:
        if folder is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        for name in ("final",) if self.monitor is None else ("final", "best"):
            check_folder(Path(folder) / name)  # now, not when training has ended
        if self.folder is None or self._resumed:
            return
        taken = next((name for name in ("final", "best") if (Path(self.folder) / name).exists()), None)
        if taken is not None:
            raise UserError(f"SavePretrained would replace {self.folder}/{taken}: remove it, or give another `folder`")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise UserError(f"SavePretrained: nothing logs {self.monitor!r}; validation logs {known}")
        # The first rank's: they need not agree on what is logged without `sync_dist`.
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if better and not math.isnan(value):  # nothing is better than NaN: it would stay the best
            self.best = value
            with ExitStack() as stack:  # callbacks that validate an average have swapped back, or will
                for callback in trainer.callbacks:
                    if hasattr(callback, "as_validated"):
                        stack.enter_context(callback.as_validated(trainer))
                self._save(trainer, pl_module, "best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "final")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self._resumed = state_dict["best"], True

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        folder = self.folder or trainer.log_dir
        if trainer.fast_dev_run:
            return
        if folder is None:
            raise UserError("SavePretrained needs a run folder: give the trainer a logger, or the callback a `folder`")
        alike(lambda: check_finite_weights(trained_weights(pl_module)))
        alike(lambda: export(trainer, pl_module, Path(folder) / name, adapter=self.adapter))


def export(trainer: Trainer, pl_module: LightningModule, target: Path, **options: Any) -> None:
    """Write the module's folder, in the place of an older one when it is whole; to be called on every rank."""
    first, fresh = trainer.is_global_zero, target.with_name(f"{target.name}.writing")
    if first:
        shutil.rmtree(fresh, ignore_errors=True)
    if first or type(trainer.strategy).__name__ == "ModelParallelStrategy":  # then every rank holds a part
        pl_module.save_pretrained(fresh, **options)
    if first:
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fresh, target)


class BatchCheckpoint(Checkpoint):
    """Saves ``<run folder>/checkpoints/batch_<n>.ckpt`` every `every` training batches and at the end, and keeps the
    last ones.

    For PPO a training batch is a PPO batch; Lightning's ModelCheckpoint counts optimizer steps, of which a PPO batch
    has many and, with early stopping, not always as many. A batch is saved when all that follows it is done, its
    validation too: before the next batch, or at the epoch's end. A file appears under its name when it is whole and on
    the disk. A run that resumes from one takes the very next batch; what was logged after the checkpoint is removed.

    Args:
        every: training batches between checkpoints.
        keep: how many of the latest stay.

    Raises:
        UserError: a checkpoint cannot be written (those before stay as they are), or the run's folder is gone; on
            every rank, though the first alone writes.
    """

    def __init__(self, every: int = 50, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"BatchCheckpoint: every and keep must be 1 or more, got {every} and {keep}")
        self.every, self.keep = every, keep
        self.batches = 0  # training batches done
        self.saved = 0  # of the last checkpoint
        self.last: Path | None = None  # checkpoint
        self._saving = False
        self._resumed: Position | None = None
        self._marks: dict[str, int] = {}  # where the logs stood when it was written
        self._optimizers: int | None = None  # whose state it holds
        self._loaded: Path | None = None  # the checkpoint that the run goes on from

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = self._folder(trainer)
        alike(lambda: check_folder(folder))
        if self._optimizers not in (None, len(trainer.optimizers)):  # Lightning takes as many as there are
            had, has = self._optimizers, len(trainer.optimizers)
            raise UserError(f"the checkpoint {self._loaded} is of a model of {had} optimizers, and this one has {has}")
        rewind(trainer, self._marks)  # here, when all of the checkpoint is in its place: it cannot be undone
        self._marks, self._optimizers = {}, None
        if self._resumed is not None:
            self._resumed.enter(trainer)
            self._resumed = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go through the end of training where the resumed run was over, by `max_steps` or because it was to stop:
        Lightning does not, and what was on its way when the run died, such as ``final``, would never be written."""
        if self._resumed is None:
            return
        self._resumed = None
        trainer.print("the run was over when it was saved: nothing is trained")
        for hook in ("on_train_start", "on_train_end"):
            call._call_callback_hooks(trainer, hook)
            call._call_lightning_module_hook(trainer, hook)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:  # a gradient on its way is not kept
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.batches > self.saved and not trainer.fast_dev_run:  # a run that is over may go on for longer
            self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = self.saved = state_dict["batches"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run_log"] = mark(trainer)
        if self._saving:  # others save where they like, within a batch too
            checkpoint["position"] = Position.of(trainer)._asdict()
            checkpoint["stopped_with"] = _patience(trainer) if trainer.should_stop else None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self._loaded = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        trainer.num_sanity_val_steps = 0  # the start was validated when the run began
        self._marks, self._optimizers = checkpoint.get("run_log", {}), len(checkpoint.get("optimizer_states", ()))
        trainer.should_stop = checkpoint.get("stopped_with") == _patience(trainer)  # and not with more patience now
        if "position" in checkpoint:
            self._resumed = Position(**checkpoint["position"])
            self._resumed.restore(checkpoint["loops"]["fit_loop"], trainer.max_epochs)

    def save(self, trainer: Trainer) -> Path:
        """Write the checkpoint of the batches done, unless it stands; to be called between two batches."""
        if self.last is None or self.saved != self.batches:
            self._save(trainer)
        return self.last

    def _save_if_due(self, trainer: Trainer) -> None:
        if self.batches // self.every > self.saved // self.every and not trainer.fast_dev_run:
            self.save(trainer)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"

    def _save(self, trainer: Trainer) -> None:
        target = self._folder(trainer) / f"batch_{self.batches:06d}.ckpt"
        alike(lambda: self._prepare(trainer, trainer.lightning_module, target))
        self._saving = True
        try:
            error = write_whole(trainer, target.with_suffix(".writing"))
            alike(lambda: self._name(trainer, target, error))
        finally:
            self._saving = False
        self.saved, self.last = self.batches, target

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, target: Path) -> None:
        """What may fail on the first rank alone before all of them bring their weights together."""
        if self.last is not None and trainer.is_global_zero and not target.parent.is_dir():
            raise UserError(f"the run's folder is gone: {target.parent} (the last checkpoint was {self.last.name})")
        check_finite_weights(trained_weights(pl_module))
        with self._saying_what_is_kept(target):
            flush(trainer)

    def _name(self, trainer: Trainer, target: Path, error: OSError | None) -> None:
        """Give what was written its name, and remove what is too old; or say why it could not be written."""
        with self._saying_what_is_kept(target):
            if error is not None:
                raise error
            if trainer.is_global_zero:
                os.replace(target.with_suffix(".writing"), target)
                sync_folder(target.parent)
                (target.parent.parent / UNSAVED).unlink(missing_ok=True)
                self._remove_old(target.parent, target)

    @contextmanager
    def _saying_what_is_kept(self, target: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            good = next((path for path in (self.last, self._loaded) if path and path.exists()), None)
            kept = f"the last good checkpoint is {good}" if good else "there is none before it"
            raise UserError(f"cannot write {target}: {error.strerror or error}; {kept}") from error

    def _remove_old(self, folder: Path, target: Path) -> None:
        # What counts higher is of another run in the same folder, and would push out the file just written.
        mine = sorted(path for path in folder.glob("batch_*.ckpt") if path <= target)
        for old in [*mine[: -self.keep], *folder.glob("*.writing")]:  # and what a killed run was writing
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()


def trained_weights(pl_module: LightningModule) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}


def check_finite_weights(weights: dict[str, Tensor]) -> None:
    """Raise a `UserError` where weights hold NaN or infinity, before they take the place of good ones."""
    name = first_not_finite(weights)
    if name is not None:
        raise UserError(
            f"the weights {name} are not finite, and are not saved; what was saved before stays: go on from the last "
            "checkpoint with a lower learning rate"
        )


def _patience(trainer: Trainer) -> dict[str, int]:
    """That of each callback that may stop the run early."""
    stoppers = (callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping))
    return {callback.state_key: callback.patience for callback in stoppers}
