"""The parts of a policy module that FSDP2 shards over processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import nn

from elastic_lightning.algorithms.policy_checkpoint import drop_others
from elastic_lightning.algorithms.strategies import check_shardable, check_sharding, layer_dtype
from elastic_lightning.policies.portions import Portions
from elastic_lightning.policies.sharding import check_apart, filled, gathered, models_of, shard, skeleton
from elastic_lightning.ranks import any_rank

if TYPE_CHECKING:
    from elastic_lightning.algorithms.base import PolicyModule


class Shards:
    """Policy and reference where they are sharded; false where nothing is."""

    def __init__(self) -> None:
        self.roots: dict[str, nn.Module] = {}  # what is sharded, by name; frozen and trained
        self.policy_skeleton: nn.Module | None = None  # the policy's model without weights

    def __bool__(self) -> bool:
        return bool(self.roots)

    def make(self, module: PolicyModule) -> None:
        """Shard policy, reference and reward model in place, for Lightning's `ModelParallelStrategy`.

        Raises:
            UserError: what cannot be had together with sharded weights.
        """
        check_sharding(module.trainer, module.execution)
        check_shardable(module.actor, module.reward)
        module.fingerprints()  # while weights are whole
        roots = {"policy": module.actor, "reference": module.reference, "initial": module.initial}
        roots = {name: root for name, root in roots.items() if isinstance(root, nn.Module)}
        if module.initial is module.reference:
            roots.pop("initial", None)
        check_apart(roots)
        self.policy_skeleton = skeleton(module.actor.lm.model)
        for root in (*roots.values(), *models_of(module.reward)):
            shard(root, module.device_mesh["data_parallel"], layer_dtype(module.trainer))
        self.roots = roots
        module.sample.going_on = any_rank  # each decode step of a rank gathers layers from all: they stop together
        module.portions.fixed = True
        for part in module.reward.modules() if isinstance(module.reward, nn.Module) else ():
            if isinstance(getattr(part, "portions", None), Portions):
                part.portions.fixed = True
        module.register_state_dict_post_hook(drop_others)  # before what is frozen would be gathered for a checkpoint

    def gathered(self) -> AbstractContextManager:
        """Within this context, which records no gradient, parts of a sharded policy and its reference can be called."""
        return gathered(*self.roots.values())

    def whole_policy(self, model: nn.Module, keep: bool) -> nn.Module | None:
        """The policy's model with all its weights, on the CPU, on a rank that is to `keep` it; every rank is asked."""
        return filled(self.policy_skeleton, model, keep) if self else model
