"""Learning-rate schedules as factors of the peak rate, and where a run ends."""

from __future__ import annotations

import math
from typing import Literal

from lightning import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_warn

from elastic_lightning.errors import UserError

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: Schedule, step: int, warmup: int, total: float) -> float:
    """Factor at `step` (from 0) of `total`: linear warm-up over `warmup` steps, then constant, or down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def batches_of_run(trainer: Trainer, done: int, steps: int) -> float:
    """Training batches of a whole run, whichever of its ends comes first; infinite where none can be counted.

    Args:
        trainer: of manual optimization, whose `max_steps` counts optimizer steps.
        done: batches that are finished.
        steps: optimizer steps that each of the others takes; where some take fewer, the end moves away as they do.
    """
    ends = [math.inf]
    if trainer.max_epochs and trainer.max_epochs > 0:
        ends.append(trainer.num_training_batches * trainer.max_epochs)
    if trainer.max_steps >= 0:
        ends.append(done + math.ceil((trainer.max_steps - trainer.global_step) / steps))
    return min(ends)


def check_end(trainer: Trainer, option: str, schedule: Schedule, batches: float = 0) -> None:
    """Refuse a schedule that decays, named by its `option`, in a run whose end cannot be counted.

    Args:
        trainer: says how long the run is.
        option: of the schedule.
        schedule: a constant one needs no end.
        batches: of an epoch, where they are known; infinite for a loader without a length.
    """
    if schedule == "constant":
        return
    if (trainer.max_epochs == -1 or batches == math.inf) and trainer.max_steps == -1:
        why = "the training data has no length" if batches == math.inf else "nothing says when the run is over"
        raise UserError(
            f"{option}: {schedule} decays to the run's end, and {why}: set trainer.max_steps (or max_epochs, for data "
            f"of known length; max_time is no count), or {option}: constant"
        )
    if batches == 0 and any(isinstance(callback, Timer) for callback in trainer.callbacks):
        rank_zero_warn(
            f"trainer.max_time may end the run before its learning rate has decayed: {option}: {schedule} counts "
            "max_epochs and max_steps alone"
        )
