"""The weights of a policy module: which are averaged, sharded, exported and kept in a checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.kept_weights import (
    check_fingerprints,
    check_weights,
    fingerprint,
    names_without,
)
from elastic_lightning.algorithms.strategies import (
    check_shardable,
    check_sharding,
    layer_dtype,
    load_sharded_optimizer,
)
from elastic_lightning.errors import UserError
from elastic_lightning.policies import ActorCritic, PolicyLM
from elastic_lightning.policies.portions import Portions
from elastic_lightning.policies.saving import save_model
from elastic_lightning.policies.sharding import check_apart, filled, full, gathered, models_of, shard, skeleton
from elastic_lightning.policies.sums import write_sums
from elastic_lightning.rewards import Reward

FROZEN_PARTS = ("actor", "initial", "reward", "receiver")  # where weights lie that checkpoints leave out


class PolicyWeights(LightningModule):
    """What weight callbacks, FSDP2, `save_pretrained` folders and checkpoints see of a policy.

    A subclass sets what is declared here.

    Attributes:
        actor: the policy and its value function.
        reference: what the KL penalty is taken against; a module where it is a copy of the policy.
        initial: theta_0, what drift is measured against; the same object, unless something moves the reference.
        ppo_step: PPO batches done.
        sampling_seed: what a run draws with; one resumes with the same.
    """

    trained_modules: tuple[str, ...] = ("actor",)  # what a checkpoint keeps the trained weights of
    actor: ActorCritic
    tokenizer: PreTrainedTokenizerBase
    reference: Any
    initial: Any
    reward: Reward
    execution: Execution
    portions: Portions
    sampling_seed: int

    def __init__(self) -> None:
        super().__init__()
        self.ppo_step = 0
        self._fingerprints: dict[str, str] | None = None
        self._sharded: dict[str, torch.nn.Module] = {}  # what is sharded, by name; frozen and trained
        self._skeletons: dict[str, torch.nn.Module] = {}  # of what is sharded, without weights; no part of the module
        self.strict_loading = False  # frozen weights stay out of checkpoints; on_load_checkpoint checks the rest

    # What is averaged, and what is exported ----------------------------------------------------------------------

    def shadowed_parameters(self) -> dict[str, Tensor]:
        """The weights that Elastic Reset averages and resets: the policy's trainable ones, not the value function's."""
        return _trained(self.actor.lm)

    def reference_weights(self) -> dict[str, Tensor] | None:
        """The reference's weights by the names of `shadowed_parameters`, where it is a copy: theta_0, until moved."""
        weights = getattr(self.reference, "weights", lambda: None)()
        return None if weights is None else {name: weights[name] for name in _trained(self.actor.lm)}

    def save_pretrained(self, folder: str | Path, adapter: str = "merged") -> None:
        """Write a folder that transformers loads: policy and tokenizer, and the value head in a file of its own."""
        model, first = self.actor.lm.model, self.global_rank == 0
        if self._sharded:  # every rank is asked here, as each holds a part
            model = filled(self._skeletons["policy"], model, keep=first)
        head = {name: full(tensor.detach()) for name, tensor in self.actor.value_head.state_dict().items()}
        if self._sharded and not first:
            return
        save_model(model, self.tokenizer, folder, adapter)
        head = {name: tensor.cpu().contiguous() for name, tensor in head.items()}
        file = Path(folder) / "value_head.safetensors"
        save_file(head, file)
        write_sums(Path(folder), [file], add=True)

    # Sharding ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard policy, reference and reward model, where the strategy is Lightning's `ModelParallelStrategy`."""
        if self.device_mesh is None or self._sharded:
            return
        check_sharding(self.trainer, self.execution)
        check_shardable(self.actor, self.reward)
        self.fingerprints()  # while weights are whole
        roots = {"policy": self.actor}
        roots |= {"reference": self.reference} if isinstance(self.reference, torch.nn.Module) else {}
        roots |= {"initial": self.initial} if self.initial is not self.reference else {}
        rewards = models_of(self.reward)
        check_apart(roots)
        self._skeletons["policy"] = skeleton(self.actor.lm.model)
        for root in (*roots.values(), *rewards):
            shard(root, self.device_mesh["data_parallel"], layer_dtype(self.trainer))
        self._sharded = roots
        self.portions.fixed = True
        for module in self.reward.modules() if isinstance(self.reward, torch.nn.Module) else ():
            if isinstance(getattr(module, "portions", None), Portions):
                module.portions.fixed = True
        self.register_state_dict_post_hook(_keep_trained)  # before what is frozen would be gathered for a checkpoint

    def gathered(self) -> AbstractContextManager:
        """Within this context, which records no gradient, parts of a sharded policy and its reference can be called."""
        return gathered(*self._sharded.values())

    # Checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained; reward, reference and frozen base weights are loaded from where they came from."""
        kept = self._checkpointed_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
        checkpoint["ppo_step"], checkpoint["sampling_seed"] = self.ppo_step, self.sampling_seed
        checkpoint["frozen"] = dict(self.fingerprints())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self._sharded:
            check_weights(checkpoint["state_dict"], self.state_dict(), self._checkpointed_names())
        elif self.trainer.state.fn == "fit":  # the strategy has taken the weights, and checked their names and shapes
            for optimizer, state in zip(self.trainer.optimizers, checkpoint["optimizer_states"], strict=True):
                load_sharded_optimizer(optimizer, state)
        if not isinstance(checkpoint.get("ppo_step"), int):
            raise UserError("the checkpoint is not of a policy trained here: it holds no ppo_step")
        frozen, seed = checkpoint.get("frozen", {}), checkpoint.get("sampling_seed", self.sampling_seed)
        if self._trainer is None or self.trainer.state.fn != "fit":
            frozen.pop("reward", None)  # a policy may be measured by another reward, but not go on learning from it
        elif seed != self.sampling_seed:
            raise UserError(
                f"the checkpoint is of a run with seed {seed}, and this one's is {self.sampling_seed}: "
                "resume with the seed it was written with"
            )
        check_fingerprints(frozen, self.fingerprints())
        self.ppo_step = checkpoint["ppo_step"]

    def fingerprints(self) -> dict[str, str]:
        """Of the weights that checkpoints leave out, by the module's part; taken once, for they do not change."""
        if self._fingerprints is None:
            trained = {name: value for name, value in self.named_parameters() if value.requires_grad}
            left = names_without(state := self.state_dict(), trained)
            parts = {name: {n: state[n] for n in left if n.startswith(f"{name}.")} for name in FROZEN_PARTS}
            self._fingerprints = {name: fingerprint(weights) for name, weights in parts.items() if weights}
        return self._fingerprints

    def _checkpointed_names(self) -> set[str]:
        named = self.named_parameters(remove_duplicate=False)  # a tied output layer is one under two names
        trained = {name for name, parameter in named if parameter.requires_grad}
        return {name for name in trained if name.split(".")[0] in self.trained_modules}

    def save_plain_hyperparameters(self, ignore: list[str]) -> None:
        """`save_hyperparameters`, with dataclasses as dicts: a checkpoint must load with ``weights_only=True``."""
        self.save_hyperparameters(ignore=ignore)
        for name, value in list(self.hparams.items()):
            if is_dataclass(value):
                self.hparams[name] = asdict(value)


def _trained(lm: PolicyLM) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}


def _keep_trained(module: PolicyWeights, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of `state_dict`: leave out what a checkpoint does not keep."""
    kept = {prefix + name for name in module._checkpointed_names()}
    for name in [name for name in state if name not in kept]:
        del state[name]
