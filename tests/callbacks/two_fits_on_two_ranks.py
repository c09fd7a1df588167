"""Somebody's own module on two processes, fitted twice, with validations of the average between; Lightning starts the
second process.

python two_fits_on_two_ranks.py ddp|fsdp OUTPUT
"""

import os
import sys

import torch
from conftest import Lab, Plain
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from plain_loop import DECAY

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAOnly


class Halves(Plain):
    """Each process takes its half of the rows of a batch; sharded where the strategy shards."""

    def configure_model(self):
        if self.device_mesh is not None and not hasattr(self.net, "unshard"):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.loss(batch.chunk(2)[self.global_rank])


def main(kind: str, output: str) -> None:
    options = {"process_group_backend": "gloo"}
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    strategy = DDPStrategy(**options) if kind == "ddp" else ModelParallelStrategy(**sizes, **options)
    lab, callback = Lab(output), ElasticReset(every=4, decay=DECAY)
    module, batches = Halves(torch.optim.SGD), lab.batches(6)
    callbacks = [callback, EMAOnly(decay=DECAY, validate=True, save=False)]
    sizes = {"devices": 2, "strategy": strategy, "num_sanity_val_steps": 1, "val_check_interval": 3}
    trainer = lab.trainer(os.path.dirname(output), callbacks, use_distributed_sampler=False, **sizes)
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, lab.loader(batches), lab.loader(batches[:1]))
    callback.store.reshard(module)
    found = {
        "online": list(module.net.parameters()),
        "ema": callback.ema.values(),
        "initial": callback.initial.values(),
    }
    whole = {n: [getattr(t, "full_tensor", lambda t=t: t)().detach() for t in ts] for n, ts in found.items()}
    if trainer.is_global_zero:
        torch.save(whole, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
