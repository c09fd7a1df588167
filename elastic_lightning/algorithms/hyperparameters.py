"""Hyper-parameters: dataclasses from those of a checkpoint, and checks that several have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

from lightning import LightningModule, Trainer

from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource

T = TypeVar("T")
TASKS = ("prompts", "language_model", "reward_model", "supervised", "pairs")  # of our data modules


def check_adam(
    prefix: str, learning_rate: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
) -> None:
    """Raise a `UserError` for what AdamW cannot step with, or would make NaN of; `prefix` is of the options' names."""
    if not 0 < learning_rate < math.inf:
        raise UserError(f"{prefix}.learning_rate must be above 0, got {learning_rate}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{prefix}: AdamW's betas must be two numbers in [0, 1), got {betas}")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"{prefix}.weight_decay must be 0 or more, got {weight_decay}")
    if not 0 < eps < math.inf:  # with 0 a weight without gradient becomes 0/0
        raise UserError(f"{prefix}: AdamW's eps must be above 0, got {eps}")


def check_task(trainer: Trainer, *tasks: str) -> None:
    """Raise a `UserError` where the data module serves another stage (its `task`) than the `tasks` of a module."""
    task = getattr(getattr(trainer, "datamodule", None), "task", None)
    if task in TASKS and task not in tasks:
        module, data = type(trainer.lightning_module).__name__, type(trainer.datamodule).__name__
        wanted = f"{' or '.join(tasks)}: set data.init_args.task" if tasks else f"another data module than {data}"
        raise UserError(f"data's task is {task}, and {module} needs {wanted}")


def from_plain(kind: type[T], value: T | Mapping[str, Any]) -> T:
    """The dataclass `kind` from the dict of its fields, which ``load_from_checkpoint`` brings back."""
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    if kind is ModelSource and fields.get("lora") is not None:
        fields["lora"] = from_plain(LoRA, fields["lora"])
    return kind(**fields)


def save_plain_hyperparameters(module: LightningModule, ignore: Sequence[str] = ()) -> None:
    """`save_hyperparameters`, with dataclasses as dicts: a checkpoint must load with ``weights_only=True``."""
    module.save_hyperparameters(ignore=[*ignore])
    for name, value in list(module.hparams.items()):
        if is_dataclass(value):
            module.hparams[name] = asdict(value)
