"""Elastic Reset and its relatives: each is a line over initial, reference, ema and online weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from elastic_lightning.callbacks.saving import export
from elastic_lightning.callbacks.weight_members import are_of, weights_of
from elastic_lightning.callbacks.weight_sets import UpdateOn, WeightSets
from elastic_lightning.callbacks.weight_store import part
from elastic_lightning.errors import UserError
from elastic_lightning.functional import copy_
from elastic_lightning.outputs import check_folder
from elastic_lightning.policies.checkpoints import read_checkpoint
from elastic_lightning.ranks import alike


class ElasticReset(WeightSets):
    """Every `every` training batches the online model is reset to its average, and the average to the initial model.

    Noukhovitch, Lavoie, Strub, Courville: "Language Model Alignment with Elastic Reset", NeurIPS 2023
    (https://arxiv.org/abs/2312.07551). It works on any LightningModule, in automatic or manual optimization:
    ``Trainer(callbacks=[ElasticReset(every=260)])``. The value head of a policy is neither averaged nor reset; the
    optimizer, learning rate and KL coefficient are left alone.

    The released script resets one batch later (after batches 261, 521, ...), and does not say whether its average moves
    once an optimizer step or once a batch: `update_on` decides, and its default is our choice.

    Args:
        decay: of the average, constant; 0.995 in the paper's released settings.
        every: training batches between resets (for PPO: PPO batches), at the end of batch every, 2 * every, ...
        update_on: move the average after each optimizer step or after each training batch.
        parameters: patterns of parameter names that take part; all trainable ones by default.
        offload: keep the average (and theta_0, where no reference holds it) in CPU memory, moved beside the training.
        buffers: average and reset floating-point buffers too, such as BatchNorm's statistics; see `WeightSets`, which
            also says what a second fit, another module, several optimizers and accumulated gradients do.
    """

    uses_initial = True

    def reset(self) -> None:
        copy_(self.online, self.ema)
        copy_(self.ema, self.initial)


class HareTortoise(WeightSets):
    """online <- ema every `every` batches; the average goes on (https://arxiv.org/abs/2406.02596)."""

    def reset(self) -> None:
        copy_(self.online, self.ema)


class ResetToInitial(WeightSets):
    """online <- initial every `every` batches: the ablation that keeps nothing but optimizer and value head."""

    uses_ema = False
    uses_initial = True

    def __init__(self, every: int, parameters: list[str] | None = None, buffers: bool = False) -> None:
        super().__init__(every, decay=0.0, parameters=parameters, buffers=buffers)

    def reset(self) -> None:
        copy_(self.online, self.initial)


class ReferenceReset(WeightSets):
    """reference <- online every `every` batches: the anchor of the KL penalty follows, as in ProRL
    (https://arxiv.org/abs/2505.24864). Drift is still measured from the initial policy."""

    uses_ema = False
    moves_online = False
    moves_reference = True

    def __init__(self, every: int, parameters: list[str] | None = None) -> None:
        super().__init__(every, decay=0.0, parameters=parameters)

    def reset(self) -> None:
        copy_(self.reference, self.online)


class EMAAnchor(WeightSets):
    """reference <- ema at every update: the KL penalty pulls towards the policy's own average, as in WARP
    (https://arxiv.org/abs/2406.16768). Drift is still measured from the initial policy."""

    moves_online = False
    moves_reference = True

    def __init__(
        self, decay: float = 0.995, update_on: UpdateOn = "optimizer_step", parameters: list[str] | None = None
    ) -> None:
        super().__init__(None, decay, update_on=update_on, parameters=parameters)

    def after_update(self) -> None:
        copy_(self.reference, self.ema)


class EMAOnly(WeightSets):
    """Keeps the average and never resets.

    With `validate` it is the average that is measured: by validation in a fit, and by validate, test and predict of the
    Trainer or the command line. Where these load a checkpoint it is the average of that checkpoint: the best file of
    a ModelCheckpoint measures what was monitored. A checkpoint's ``state_dict``, and ``load_from_checkpoint``, have the
    weights that training goes on from; `EMAOnly.load_average` puts its average into a module.

    Args:
        decay: of the average.
        update_on: move the average after each optimizer step or after each training batch.
        parameters: patterns of parameter names that take part; all trainable ones by default.
        validate: validate, test and predict with the average in place of the online weights.
        save: at the end write the average as ``<run folder>/ema`` (modules with `save_pretrained`).
        offload: keep the average in CPU memory, moved beside the training.
        buffers: average floating-point buffers too, such as BatchNorm's statistics.
    """

    def __init__(
        self,
        decay: float = 0.995,
        update_on: UpdateOn = "optimizer_step",
        parameters: list[str] | None = None,
        validate: bool = False,
        save: bool = True,
        offload: bool = False,
        buffers: bool = False,
    ) -> None:
        super().__init__(None, decay, update_on, parameters, offload, buffers)
        self.validate, self.save = validate, save
        self._swapped = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        bare = any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.callbacks)
        if self.validate and stage == "fit" and bare:
            rank_zero_warn(
                "EMAOnly: validation measures the average, which the files of a ModelCheckpoint with save_weights_only "
                "do not hold"
            )

    @staticmethod
    def load_average(pl_module: LightningModule, checkpoint: str | Path) -> None:
        """Put the average that this callback left in a checkpoint into a module, in place of its weights.

        Raises:
            UserError: the file holds none, or one of another model.
        """
        states = read_checkpoint(checkpoint).get("callbacks", {})
        averages = [state["ema"] for key, state in states.items() if key.split("{")[0] == "EMAOnly" and "ema" in state]
        if not averages:
            raise UserError(f"{checkpoint} holds no average of EMAOnly")
        own = weights_of(pl_module) | dict(pl_module.named_buffers())
        for average in averages:
            try:
                copy_(part(own, own.keys() & average.keys()), average)
            except ValueError as error:
                raise UserError(f"the average in {checkpoint} is of another model: {error}") from error

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_back()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_back()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_back()
        super().on_exception(trainer, pl_module, exception)

    def as_validated(self, trainer: Trainer) -> AbstractContextManager:
        """Within this context the weights are those that validation measured: for whoever saves the best of them."""
        if not self.validate or not self.ema or self._swapped is not None:
            return nullcontext()
        _settle_all(trainer)
        return self.average_weights()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        target = self._target(trainer, pl_module)
        if target is not None:
            alike(lambda: check_folder(target))  # now, not when training has ended

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        target = self._target(trainer, pl_module)

        def write() -> None:
            _settle_all(trainer)
            with self.average_weights():
                export(trainer, pl_module, target)

        if target is not None:
            self.settle()
            alike(self._check_average)
            alike(write)

    def _target(self, trainer: Trainer, pl_module: LightningModule) -> Path | None:
        """Where the average is saved at the end, if it is."""
        folder = trainer.log_dir  # asked for on every rank: the first one tells the others
        saves = self.save and folder and not trainer.fast_dev_run and hasattr(pl_module, "save_pretrained")
        return Path(folder) / "ema" if saves else None

    def _swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average of this module in place, if there is one: the first sanity check comes before it."""
        if not self.validate:
            return
        if self._loaded.state:
            with torch.inference_mode(False):  # a fit may go on from these
                self.begin(trainer, pl_module)
        elif trainer.state.fn != "fit" and trainer.ckpt_path:
            rank_zero_warn(f"EMAOnly: {trainer.ckpt_path} holds no average: its weights are measured as they are")
            return
        self.store.reshard()
        if are_of(pl_module, self.online.values()):
            _settle_all(trainer)
            self._swapped = self.average_weights()
            self._swapped.__enter__()

    def _swap_back(self) -> None:
        if self._swapped is not None:
            swapped, self._swapped = self._swapped, None
            swapped.__exit__(None, None, None)


def _settle_all(trainer: Trainer) -> None:
    """Before the weights are swapped: no offloaded average may still be reading them."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightSets):
            callback.settle()
