"""What the supervised stages share: AdamW, a learning-rate schedule, dataclass hyper-parameters."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.utils import get_total_norm

from elastic_lightning.algorithms.faults import Faults
from elastic_lightning.algorithms.hyperparameters import check_adam
from elastic_lightning.algorithms.kept_weights import (
    check_fingerprints,
    check_weights,
    fingerprint,
    frozen_part,
    names_without,
)
from elastic_lightning.algorithms.memory import keep_memory_of_fit
from elastic_lightning.algorithms.precision import warn_of_emulation, warn_of_lost_updates
from elastic_lightning.algorithms.schedules import Schedule, check_end, schedule_factor
from elastic_lightning.checks import check_counts
from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.policies.checked_model import context_length
from elastic_lightning.ranks import mean_of_ranks


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW with a schedule over optimizer steps.

    Attributes:
        learning_rate: peak rate.
        weight_decay: on matrices; biases and norms have none.
        betas: of AdamW.
        schedule: after the warm-up; linear and cosine reach 0 where the run ends, by trainer.max_epochs or max_steps.
        warmup: optimizer steps of linear warm-up.
        max_skipped: steps of a run that may be skipped because their gradient is NaN or infinite; one more stops the
            run, and with 0 the first does.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Schedule = "cosine"
    warmup: int = 100
    max_skipped: int = 5

    def __post_init__(self) -> None:
        check_adam("optimizer", self.learning_rate, self.betas, self.weight_decay)
        if self.schedule not in get_args(Schedule):
            raise UserError(f"optimizer.schedule must be one of {get_args(Schedule)}, got {self.schedule!r}")
        check_counts("optimizer.", vars(self), "warmup", "max_skipped", least=0)


def can_fuse(trainer: Trainer, device: torch.device) -> bool:
    """Whether AdamW may update all weights in one kernel. With a gradient scaler it would unscale by itself, after the
    clipping; and under autocast Lightning's own clipping refuses it, scaler or not."""
    mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    scaled = mixed and trainer.precision_plugin.scaler is not None
    return device.type in ("cpu", "cuda") and not scaled and not (mixed and trainer.gradient_clip_val)


def check_texts_fit(trainer: Trainer, model: nn.Module) -> None:
    """Raise a `UserError` where the data's longest text (its `max_tokens`) is longer than a model has positions for."""
    longest, context = getattr(getattr(trainer, "datamodule", None), "max_tokens", None), context_length(model)
    if longest is not None and context is not None and longest > context:
        raise UserError(f"data's max_tokens {longest} is more than the model's {context} positions: lower it")


class SupervisedModule(LightningModule):
    """A Hugging Face model trained by automatic optimization; subclasses define the steps.

    A token (or row, or pair: what the loss is a mean over) weighs the same on every rank and in every batch whose
    gradients are accumulated, however many each of them holds: the gradient is that of one batch of all of them.
    """

    model: nn.Module
    optimizer_config: AdamWConfig

    def __init__(self) -> None:
        super().__init__()
        self.faults = Faults("optimizer step", "optimizer.max_skipped")
        self._last_loss = torch.tensor(math.nan)  # for the message of a fault
        self.batch_skipped = False  # weight callbacks leave such a batch out of their average
        self._weight = 0.0  # of the batch in hand, see `weighted`
        self._accumulated = 0.0  # of the batches whose gradients the weights hold
        self.strict_loading = False  # frozen weights stay out of checkpoints; on_load_checkpoint checks the rest

    def setup(self, stage: str) -> None:
        keep_memory_of_fit(self.trainer, stage)
        warn_of_emulation(self, self.trainer)

    def on_fit_start(self) -> None:
        warn_of_lost_updates(self, self.trainer)
        check_end(self.trainer, "optimizer.schedule", self.optimizer_config.schedule)

    def on_train_start(self) -> None:
        batches = self.trainer.num_training_batches
        check_end(self.trainer, "optimizer.schedule", self.optimizer_config.schedule, batches)

    def configure_optimizers(self) -> dict[str, Any]:
        config = self.optimizer_config
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=tuple(config.betas),
            fused=can_fuse(self.trainer, self.device) or None,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: schedule_factor(config.schedule, step, config.warmup, self._total_steps(step))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _total_steps(self, step: int) -> float:
        """Optimizer steps of the run. Not asked for before the first, whose rate does not depend on it: the question
        makes Lightning build the loader, and a resumed run's must be built after the checkpoint is read."""
        return self.trainer.estimated_stepping_batches if step > 0 else float("inf")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout is a function of (seed, step, rank): a resumed run drops what the unbroken one would."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        words = [seed, self.global_step, batch_idx, self.global_rank]
        self.batch_skipped = False
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))

    def weighted(self, loss: torch.Tensor, count: int) -> torch.Tensor:
        """The loss of this rank's batch, a mean over `count`, as its part of the mean over all ranks: DDP averages
        gradients, and the log losses, over ranks. `backward` does the same for batches that are accumulated."""
        self._weight = mean_of_ranks(float(count))
        return loss * (count / self._weight)

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self._last_loss = loss.detach()

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Where gradients are accumulated they are kept as the mean so far; Lightning has divided the loss by a number
        of batches, which may be more than there are at an epoch's end. What was dropped counts no more."""
        batches = self.trainer.accumulate_grad_batches
        if batches > 1 and self._weight > 0:
            gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
            before = self._accumulated if gradients else 0.0
            self._accumulated = before + self._weight
            if gradients:
                torch._foreach_mul_(gradients, before / self._accumulated)
            loss = loss * (batches * self._weight / self._accumulated)
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take no step of a gradient that is not finite: without gradients neither weights nor moments move. All ranks
        decide alike, for they hold the same gradient. A gradient scaler looks after its own."""
        self.batch_skipped = False
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        norm = get_total_norm(gradients).item()
        if not math.isfinite(norm):
            optimizer.zero_grad()
            self.batch_skipped = True
            fault = NotFinite("gradient", f"norm {norm}, where the loss is {self._last_loss.item():.3g}")
            self.faults.skip(fault, self.global_step + 1, self.optimizer_config.max_skipped)
            self.log_dict(self.faults.scalars())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what is frozen: it is loaded from where it came from."""
        state, frozen = checkpoint["state_dict"], frozen_part(self)
        kept = names_without(self.state_dict(), frozen)
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in kept}
        if frozen:
            checkpoint["frozen"] = {"base": fingerprint(frozen)}
        checkpoint["faults"] = self.faults.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, frozen = self.state_dict(), frozen_part(self)
        check_weights(checkpoint["state_dict"], own, names_without(own, frozen))
        if "frozen" in checkpoint:
            check_fingerprints(checkpoint["frozen"], {"base": fingerprint(frozen)})
        if "faults" in checkpoint:  # not in those of earlier versions
            self.faults.load_state_dict(checkpoint["faults"])

    def shadowed_parameters(self) -> dict[str, torch.Tensor]:
        """The weights that weight callbacks average: the trainable ones."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save_pretrained(self, folder: str | Path, adapter: str = "merged") -> None:
        """Write a folder that transformers loads, with the tokenizer."""
        from elastic_lightning.policies.saving import save_model

        save_model(self.model, self.tokenizer, folder, adapter)
