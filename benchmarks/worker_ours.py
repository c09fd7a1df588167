"""Our PPO, one batch at a turn. Started by the benchmarks, see `lockstep.py`."""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch
from lightning import Callback, Trainer, seed_everything
from lockstep import Turns
from measure import peak_mib, synchronise
from paths import PlainPPO
from shapes import Shape, prepare, prompts
from torch.utils.data import DataLoader

from elastic_lightning import ElasticReset
from elastic_lightning.algorithms import PPO, Execution, PPOConfig
from elastic_lightning.policies import LoRA, ModelSource, Prompts, Sampling
from elastic_lightning.rewards import ClassifierReward


class InTurn(Callback):
    """Waits before each batch and reports after it; the last callback, so that a reset is part of the batch."""

    def __init__(self, turns: Turns, idle_mib: float) -> None:
        self.turns = turns
        self.optimizer_steps = 0
        self.idle_mib = idle_mib

    def on_train_start(self, trainer, module) -> None:
        trainer.optimizers[0].register_step_post_hook(self._count)
        self.turns.report(ready=True)

    def _count(self, *args) -> None:
        self.optimizer_steps += 1

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.turns.wait()
        self.optimizer_steps = 0
        synchronise()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        synchronise()
        seconds = time.perf_counter() - self.began
        resets = [callback.seconds for callback in trainer.callbacks if isinstance(callback, ElasticReset)]
        self.turns.report(
            seconds=seconds,
            optimizer_steps=self.optimizer_steps,
            peak_mib=peak_mib(),
            idle_mib=self.idle_mib,
            parts=module.seconds,
            reset_seconds=sum(resets),
        )


def main() -> None:
    options, idle_mib = json.loads(sys.argv[1]), peak_mib()
    shape = Shape(**options["shape"])
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    folder = prepare(shape)
    cuda = torch.cuda.is_available()
    lora = LoRA(rank=16) if options.get("lora") else None
    module = (PlainPPO if options.get("plain_loss") else PPO)(
        ModelSource(str(folder / "policy"), lora=lora, attention=options.get("attention")),
        ClassifierReward(str(folder / "reward"), label=0, output="logit", batch_size=shape.batch),
        PPOConfig(epochs=shape.epochs, mini_batches=shape.mini_batches, learning_rate=3e-6),
        Sampling(max_new_tokens=shape.response, min_new_tokens=shape.response),
        separate_value_trunk=options.get("separate", False),
        execution=Execution(**options.get("execution", {})),
        seed=1,
    )
    rows = prompts(shape, options["batches"]).split(shape.batch)
    loader = DataLoader([Prompts(part, torch.ones_like(part, dtype=torch.bool)) for part in rows], batch_size=None)
    every = options.get("reset_every")
    callbacks = [ElasticReset(every=every, offload=options.get("offload", False))] if every else []
    trainer = Trainer(
        accelerator="cuda" if cuda else "cpu",
        devices=1,
        precision=options.get("precision", "32-true"),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, InTurn(Turns(), idle_mib)],
    )
    trainer.fit(module, loader)


if __name__ == "__main__":
    main()
