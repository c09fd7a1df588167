"""The one optimizer of a policy: its groups, its learning rate over PPO batches, and the clipping of its gradients."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from elastic_lightning.algorithms.ppo.config import PPOConfig
from elastic_lightning.algorithms.schedules import batches_of_run, schedule_factor
from elastic_lightning.algorithms.supervised import can_fuse
from elastic_lightning.policies import ActorCritic
from elastic_lightning.policies.sharding import full


def policy_groups(actor: ActorCritic, config: PPOConfig) -> list[dict[str, Any]]:
    """What is trained of a policy and its value function, as groups with their learning rates and names."""
    groups = [{"params": [*actor.lm.parameters()], "lr": config.learning_rate, "name": "policy"}]
    if actor.value_head is not None:
        value = [*actor.value_head.parameters()]
        value += [] if actor.value_trunk is None else [*actor.value_trunk.parameters()]
        groups.append({"params": value, "lr": config.value_learning_rate or config.learning_rate, "name": "value"})
    return [group | {"params": [weight for weight in group["params"] if weight.requires_grad]} for group in groups]


def adamw(groups: list[dict[str, Any]], config: PPOConfig, trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """AdamW and its schedule, which is stepped once a PPO batch, as `configure_optimizers` returns them."""
    optimizer = torch.optim.AdamW(
        groups,
        betas=tuple(config.adam_betas),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=can_fuse(trainer, device) or None,  # None lets torch choose
    )
    steps = config.epochs * config.mini_batches

    def factor(done: int) -> float:
        return schedule_factor(config.schedule, done, config.warmup, batches_of_run(trainer, done, steps))

    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The global norm of all gradients, a scalar."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return full(get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))


def clip_gradient(optimizer: torch.optim.Optimizer, norm: Tensor, limit: float | None) -> None:
    """Scale all gradients down to the `limit` of their global `norm`; None leaves them."""
    # On a GPU, asking whether there is anything to clip would wait for it; on a CPU it saves a pass over the model.
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_grads_with_norm_(parameters, limit, norm)
