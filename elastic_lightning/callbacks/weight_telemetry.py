"""What a weight callback logs of its resets."""

from __future__ import annotations

from lightning import LightningModule, Trainer

WATCHED = {"reward": "train/reward", "kl": "train/kl"}  # where the module logs them


class ResetTelemetry:
    """Logs ``reset/count``, the distance to theta_0, and reward and KL of the batches before and after a reset.

    Args:
        parameters: the patterns of a callback over a part of the weights, which stand in its tag.

    Attributes:
        watched: reward and KL of the batch before a reset, until those after it are logged.
    """

    def __init__(self, parameters: list[str] | None) -> None:
        self.tag = "reset" if parameters is None else f"reset[{','.join(parameters)}]"
        self.watched: dict[str, float] = {}

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what came of a reset at the end of the batch before."""
        if self.watched:
            self._log(trainer, pl_module, {f"{name}_after": value for name, value in reward_and_kl(trainer).items()})
            self.watched = {}

    def reset(
        self, trainer: Trainer, pl_module: LightningModule, count: int, before: float | None, after: float | None
    ) -> None:
        """Log one reset; the distances are None where theta_0 is not kept."""
        self.watched = reward_and_kl(trainer)
        distances = {} if before is None else {"distance_before": before, "distance_after": after}
        watched = {f"{name}_before": value for name, value in self.watched.items()}
        self._log(trainer, pl_module, {"count": float(count)} | distances | watched)

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
        log(trainer, pl_module, {f"{self.tag}/{name}": value for name, value in values.items()})


def log(trainer: Trainer, pl_module: LightningModule, values: dict[str, float]) -> None:
    """Log during `on_train_batch_end`, on the axis of the module's own ``train/...``: its `ppo_step` where it has one,
    else how many batches have ended in an optimizer step, as Lightning counts them."""
    if trainer.is_global_zero:
        step = getattr(pl_module, "ppo_step", None)
        if step is None:  # Lightning counts this batch a little later
            loop = trainer.fit_loop
            step = loop.epoch_loop._batches_that_stepped + (not loop._should_accumulate())
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)


def reward_and_kl(trainer: Trainer) -> dict[str, float]:
    """Reward and KL of the last training batch, where the module logs them."""
    metrics = trainer.callback_metrics
    return {short: float(metrics[name]) for short, name in WATCHED.items() if name in metrics}
