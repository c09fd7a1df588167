"""What a checkpoint keeps of a module's weights, and how it knows those again that it leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from elastic_lightning.errors import UserError

CHUNK = 2**22  # elements read at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Changes with any name, type, shape or value, and with nothing else: not with the device, nor with sharding."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of a sharded one
        sums = [f"{plain}:{weighted}" for plain, weighted in _checksums(tensor)]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums}\n".encode())
    return digest.hexdigest()[:32]


def _checksums(tensor: Tensor) -> list[tuple[int, int]]:
    """Of each chunk the sum of its bits, read as integers, and a sum that depends on their order. Modulo 2^64."""
    flat = tensor.contiguous().flatten()
    sums = []
    for chunk in flat.split(CHUNK):
        bits = chunk.view(INTEGERS[chunk.element_size()]).long()
        order = torch.arange(1, len(bits) + 1, device=bits.device)
        sums.append(torch.stack([bits.sum(), (bits * order).sum()]))
    return [tuple(pair) for pair in torch.stack(sums).tolist()] if sums else []


def frozen_part(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained and lie in a folder somewhere: not peft's first copy of a head that is new."""
    named = module.named_parameters()
    return {name: value for name, value in named if not value.requires_grad and ".original_module." not in name}


def names_without(state: Mapping[str, Tensor], left_out: Mapping[str, Tensor]) -> set[str]:
    """Names of all in `state` but these tensors, under whatever name they go."""
    pointers = {tensor.data_ptr() for tensor in left_out.values()}
    return {name for name, value in state.items() if name not in left_out and value.data_ptr() not in pointers}


def check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], expected: set[str]) -> None:
    """Raise a `UserError` unless a checkpoint holds the `expected` of a module's weights, in their shapes."""
    missing, unexpected = sorted(expected - set(saved)), sorted(set(saved) - expected)
    shapes = sorted(name for name in expected & set(saved) if saved[name].shape != own[name].shape)
    if missing or unexpected or shapes:
        example = (missing + unexpected + shapes)[0]
        raise UserError(
            f"the checkpoint is of another model: {len(missing)} weights missing, {len(unexpected)} unexpected, "
            f"{len(shapes)} of another shape (e.g. {example}); use the config it was trained with"
        )


def check_fingerprints(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise a `UserError` where weights that a checkpoint leaves out are not those that it was written beside."""
    changed = [name for name in saved if name in own and saved[name] != own[name]]
    if changed:
        raise UserError(
            f"the weights of {' and '.join(changed)} are not those that the checkpoint was trained with: "
            "load the models from what was in their folders then, or start a new run"
        )
