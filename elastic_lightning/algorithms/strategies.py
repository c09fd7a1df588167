"""Which of Lightning's strategies a policy is trained with, and what sharding it excludes."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.errors import UserError
from elastic_lightning.rewards import AdapterReward

REFUSED = {
    "FSDPStrategy": "keeps weights in flat parameters without their names",
    "DeepSpeedStrategy": "keeps weights in flat buffers of its own engine, which calls the policy's forward alone",
}
PRECISIONS = ("32-true", "bf16-mixed")


def check_strategy(trainer: Trainer) -> None:
    """Raise a `UserError` for a strategy that a policy cannot be trained with."""
    name = type(trainer.strategy).__name__
    if name in REFUSED:
        raise UserError(
            f"{name} {REFUSED[name]}, so sampling, references and resets cannot work with it: use ddp, or to shard "
            "weights ModelParallelStrategy (configs/trainer/fsdp.yaml)"
        )


def check_sharding(trainer: Trainer, execution: Execution) -> None:
    """Raise a `UserError` for what cannot be had together with sharded weights."""
    strategy = trainer.strategy
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise UserError(
            f"tensor_parallel_size must be 1, and data_parallel_size the number of processes ({trainer.world_size}): "
            "weights are sharded over all of them"
        )
    if strategy._save_distributed_checkpoint:
        raise UserError(
            "set save_distributed_checkpoint: false, so that a checkpoint is one file that any number of processes "
            "can resume"
        )
    if trainer.precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision must be one of {PRECISIONS} where weights are sharded, got {trainer.precision!r}; for "
            "weights in bfloat16 set policy.dtype"
        )
    for option in ("rollout_dtype", "trainable_layers", "compile"):
        if getattr(execution, option):
            raise UserError(f"execution.{option} does not work with sharded weights: leave it out, or use ddp")


def check_shardable(policy: nn.Module, reward: Any) -> None:
    """Raise a `UserError` for a policy or a reward whose weights cannot be sharded."""
    if not all(parameter.is_floating_point() for parameter in policy.parameters()):
        raise UserError("policy.quantization does not work with sharded weights: leave it out, or use ddp")
    parts = reward.modules() if isinstance(reward, nn.Module) else ()
    if any(isinstance(part, AdapterReward) for part in parts):
        raise UserError("AdapterReward shares the policy's weights, which cannot be sharded then: merge it, or use ddp")


@torch.no_grad()
def load_sharded_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Put a saved state with whole tensors, that of any number of processes, into an optimizer of sharded weights.

    Lightning numbers a saved state by all weights of the module, and an optimizer by those it trains: here what counts
    is the order within the groups, which is the same in both.
    """
    from torch.distributed.tensor import distribute_tensor

    optimizer.state.clear()
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in saved_group.items() if name != "params"})
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            for name, value in saved["state"].get(number, {}).items():
                if value.shape == parameter.shape:
                    mesh, placements = parameter.device_mesh, parameter.placements
                    value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
                elif group.get("fused"):
                    value = value.to(parameter.device)  # the count of steps
                optimizer.state[parameter][name] = value


def layer_dtype(trainer: Trainer) -> torch.dtype | None:
    """In which type the weights of sharded layers are gathered; None is their own."""
    return torch.bfloat16 if trainer.precision == "bf16-mixed" else None
