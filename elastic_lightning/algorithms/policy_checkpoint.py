"""What a checkpoint keeps of a policy module, and what it checks before one goes on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elastic_lightning.algorithms.kept_weights import check_fingerprints, check_weights, fingerprint, names_without
from elastic_lightning.algorithms.strategies import load_sharded_optimizer
from elastic_lightning.errors import UserError

if TYPE_CHECKING:
    from elastic_lightning.algorithms.base import PolicyModule

FROZEN_PARTS = ("actor", "initial", "reward", "receiver")  # where weights lie that checkpoints leave out


def keep_state(module: PolicyModule, checkpoint: dict[str, Any]) -> None:
    """Keep what is trained; reward, reference and frozen base weights are loaded from where they came from."""
    kept = kept_names(module)
    checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in kept}
    checkpoint["ppo_step"], checkpoint["sampling_seed"] = module.ppo_step, module.sampling_seed
    checkpoint["frozen"] = dict(module.fingerprints())
    checkpoint["kl_controller"], checkpoint["faults"] = module.kl_controller.state_dict(), module.faults.state_dict()


def take_state(module: PolicyModule, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is of this policy, and take up all but its weights.

    Raises:
        UserError: it is of another model, reward or seed, or of no policy at all.
    """
    fits = module._trainer is not None and module.trainer.state.fn == "fit"
    if not module.shards:
        check_weights(checkpoint["state_dict"], module.state_dict(), kept_names(module))
    elif fits:  # the strategy has taken the weights, and checked their names and shapes
        for optimizer, state in zip(module.trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            load_sharded_optimizer(optimizer, state)
    if not isinstance(checkpoint.get("ppo_step"), int):
        raise UserError("the checkpoint is not of a policy trained here: it holds no ppo_step")
    frozen, seed = checkpoint.get("frozen", {}), checkpoint.get("sampling_seed", module.sampling_seed)
    if not fits:
        frozen.pop("reward", None)  # a policy may be measured by another reward, but not go on learning from it
    elif seed != module.sampling_seed:
        raise UserError(
            f"the checkpoint is of a run with seed {seed}, and this one's is {module.sampling_seed}: "
            "resume with the seed it was written with"
        )
    check_fingerprints(frozen, module.fingerprints())
    module.ppo_step = checkpoint["ppo_step"]
    module.kl_controller.load_state_dict(checkpoint["kl_controller"])
    if "faults" in checkpoint:  # not in those of earlier versions
        module.faults.load_state_dict(checkpoint["faults"])


def kept_names(module: PolicyModule) -> set[str]:
    """Names of the weights that a checkpoint keeps."""
    named = module.named_parameters(remove_duplicate=False)  # a tied output layer is one under two names
    trained = {name for name, parameter in named if parameter.requires_grad}
    return {name for name in trained if name.split(".")[0] in module.trained_modules}


def drop_others(module: PolicyModule, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook of `state_dict`: leave out what a checkpoint does not keep."""
    kept = {prefix + name for name in kept_names(module)}
    for name in [name for name in state if name not in kept]:
        del state[name]


def frozen_fingerprints(module: PolicyModule) -> dict[str, str]:
    """Of the weights that checkpoints leave out, by the module's part."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    left = names_without(state := module.state_dict(), trained)
    parts = {name: {n: state[n] for n in left if n.startswith(f"{name}.")} for name in FROZEN_PARTS}
    return {name: fingerprint(weights) for name, weights in parts.items() if weights}
