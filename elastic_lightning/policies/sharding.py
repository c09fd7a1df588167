"""Weights sharded over processes with FSDP2: one group a layer, and one for what belongs to no layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from elastic_lightning.errors import UserError


def shard(root: nn.Module, mesh: DeviceMesh, layer_dtype: torch.dtype | None = None) -> None:
    """Shard a module's weights in place over the processes of a mesh of one dimension.

    A layer's weights are gathered while it runs, and no longer; those of no layer (embeddings, output layer, value
    head) while `root` runs, or within `gathered`.

    Args:
        root: what is called, or entered with `gathered`, before any of its parts.
        mesh: of the processes.
        layer_dtype: in which the weights of layers are gathered and used; their own by default. Gradients are summed
            over processes in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Autocast decides what is computed in which type; the policy only gathers half the bytes.
    half = MixedPrecisionPolicy(layer_dtype, torch.float32, cast_forward_inputs=False) if layer_dtype else None
    for layer in layers_of(root):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=half or MixedPrecisionPolicy())
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    # Which group is the root is decided by the first that runs, and a layer may be the first.
    root._first_forward = lambda: None
    register_fsdp_forward_method(root, "_first_forward")
    root._first_forward()
    del root._first_forward


@contextmanager
def gathered(*roots: nn.Module) -> Iterator[None]:
    """Within this context the weights of no layer are whole in each sharded root, its parts can be called one by one,
    and no gradient is recorded. Weights must not change inside."""
    if not roots:
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # what is gathered in inference mode could not be trained
        for root in roots:
            root.unshard()
        try:
            yield
        finally:
            for root in roots:
                root.reshard()


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of every transformer in a module: the entries of its outermost lists."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [*child] if isinstance(child, nn.ModuleList) else layers_of(child)
    return found


def models_of(module: nn.Module) -> list[PreTrainedModel]:
    """The outermost models of transformers in a module, such as a reward."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in models_of(child)]


def check_apart(roots: dict[str, nn.Module]) -> None:
    """Raise a `UserError` where two named roots, or two layers, hold the same weight: it can be in one group only."""
    owners: dict[int, str] = {}
    for name, root in roots.items():
        layers = layers_of(root)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        rest = [parameter for parameter in root.parameters() if id(parameter) not in inside]
        for group, parameters in enumerate([rest, *(layer.parameters() for layer in layers)]):
            for parameter in parameters:
                if owners.setdefault(id(parameter), f"{name}:{group}") != f"{name}:{group}":
                    other = owners[id(parameter)].split(":")[0]
                    raise UserError(
                        f"{other} and {name} share weights (LoRA's base, or frozen layers), which cannot be sharded: "
                        "use reference: adapter_off and no separate_value_trunk, or trainer.strategy: ddp"
                    )


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module without its weights, to be filled by `filled`. To be made before it is sharded."""
    memo = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(module, memo)


def filled(empty: nn.Module, module: nn.Module, keep: bool) -> nn.Module | None:
    """The sharded module's whole weights, on the CPU, in its skeleton; to be called on every process, None where not
    to `keep`. The skeleton stays empty."""
    whole = {}
    for name, parameter in module.named_parameters():
        tensor = full(parameter.detach())  # one at a time: only who keeps it has more than one of them
        if keep:
            whole[name] = tensor.cpu()
    if not keep:
        return None
    by_id = dict(empty.named_parameters())
    memo = {id(by_id[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in whole.items()}
    return copy.deepcopy(empty, memo)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; a collective where it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
