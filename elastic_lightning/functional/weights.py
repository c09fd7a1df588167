"""Arithmetic on named weights: dicts from parameter name to tensor, as `dict(module.named_parameters())` gives them.

What ends in an underscore works in place and keeps the target's tensors, so that an optimizer goes on pointing at them.
The source may be of another dtype or on another device; the target decides. Names and shapes must agree: otherwise
each function raises a ValueError that says which do not.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from elastic_lightning.functional.precision import at_least_float32

Weights = dict[str, Tensor]

# Beyond this cosine a great circle and a straight line are the same to float32, and opposite deltas have no circle.
NEARLY_PARALLEL = 0.9995
PART = 2**22  # elements of a tensor that are subtracted at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes an element


@torch.no_grad()
def lerp_(target: Weights, source: Weights, weight: float) -> None:
    """target += weight * (source - target), in place and in the target's dtype.

    Keep a slow average in float32: in bfloat16 a step of 0.005 rounds to nothing.
    """
    _check_alike(target, source)
    target, source = _local(target), _local(source)
    alike = [name for name, tensor in target.items() if _same_kind(tensor, source[name])]
    if alike:
        torch._foreach_lerp_([target[name] for name in alike], [source[name] for name in alike], weight)
    # One at a time, so that there is never more than one tensor's worth of cast copies.
    for name in target.keys() - set(alike):
        target[name].lerp_(_like(source[name], target[name]), weight)


@torch.no_grad()
def copy_(target: Weights, source: Weights) -> None:
    """target = source, in place. Where the target is sharded and the source is whole, each process takes its part."""
    _check_alike(target, source)
    target, source = _local(target), _local(_sharded_like(source, target))
    if target:
        torch._foreach_copy_(list(target.values()), [source[name] for name in target])


@torch.no_grad()
def distance(a: Weights, b: Weights) -> Tensor:
    """L2 norm of a - b over all tensors together: a float32 scalar on the device of the first.

    Of sharded tensors (all over the same processes) it is that of the whole, on every process: a collective.
    """
    _check_alike(a, b)
    if not a:
        return torch.zeros(())
    meshes = [tensor.device_mesh for tensor in a.values() if _is_sharded(tensor)]
    a, b = _local(a), _local(b)
    norms = [norm for name, tensor in a.items() for norm in _norms(tensor, b[name].to(tensor.device))]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if not meshes:
        return total
    squared = total.square()
    torch.distributed.all_reduce(squared, group=meshes[0].get_group())
    return squared.sqrt()


@torch.no_grad()
def first_not_finite(weights: Weights) -> str | None:
    """The name of a tensor that holds NaN or infinity, None where none does. Of a sharded one it is this process's part
    that is looked at. One wait for the device."""
    held = {name: tensor for name, tensor in _local(weights).items() if tensor.numel()}
    if not held:
        return None
    largest = torch._foreach_norm(list(held.values()), float("inf"))
    finite = torch.stack([norm.float().to(largest[0].device) for norm in largest]).isfinite().tolist()
    return next((name for name, good in zip(held, finite, strict=True) if not good), None)


@torch.no_grad()
def slerp(start: Weights, a: Weights, b: Weights, t: float) -> Weights:
    """Spherical interpolation of the task vectors a - start and b - start, tensor by tensor.

    The merge of WARP (Ramé et al., 2024, arXiv:2406.16768): a straight line between two almost orthogonal task vectors
    cuts inside the sphere and loses their length; the great circle keeps it.

    Args:
        start: the weights both were trained from.
        a: the result at t = 0.
        b: the result at t = 1.
        t: where between them.

    Returns:
        New weights, in dtype and device those of `start`. A tensor is interpolated linearly where a task vector is zero
        or the two are nearly parallel.
    """
    _check_alike(start, a)
    _check_alike(start, b)
    return {name: _slerp(tensor, a[name], b[name], t) for name, tensor in start.items()}


def float32_copy(weights: Weights) -> Weights:
    """Detached clones, the start of a shadow: float32, or as they are where they are float64 or complex."""
    wide = {name: torch.promote_types(tensor.dtype, torch.float32) for name, tensor in weights.items()}
    return {name: tensor.detach().to(wide[name], copy=True) for name, tensor in weights.items()}


@torch.no_grad()
def bit_sums(weights: Weights) -> dict[str, int]:
    """The bits of each tensor, read as integers and added up modulo 2^64: other where a single one was changed, and the
    same on any device. Of what is sharded, this process's part."""
    held = {name: tensor.contiguous().flatten() for name, tensor in _local(weights).items()}
    sums = {name: sum(_bits(part).sum() for part in tensor.split(PART)) for name, tensor in held.items()}
    return {name: int(total) for name, total in sums.items()}


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, whose module takes its time to import


def _local(weights: Weights) -> Weights:
    """This process's part of what is sharded, the same memory; the rest as it is."""
    return {name: tensor.to_local() if _is_sharded(tensor) else tensor for name, tensor in weights.items()}


def _sharded_like(source: Weights, target: Weights) -> Weights:
    """The source with each whole tensor sharded as the target's is; every process has the same whole."""
    found = {}
    for name, tensor in source.items():
        if _is_sharded(target[name]) and not _is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = target[name].device_mesh, target[name].placements
            tensor = distribute_tensor(tensor.to(target[name].device), mesh, placements, src_data_rank=None)
        found[name] = tensor
    return found


def _norms(a: Tensor, b: Tensor) -> list[Tensor]:
    """L2 norms of parts of a - b, which as a whole would be one more copy of a large tensor."""
    parts = zip(a.flatten().split(PART), b.flatten().split(PART), strict=True)
    return [torch.linalg.vector_norm(at_least_float32(x) - at_least_float32(y)).float() for x, y in parts]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS.get(tensor.element_size(), torch.int64)).long()  # 16 bytes a complex128: two of 8


def _slerp(start: Tensor, a: Tensor, b: Tensor, t: float) -> Tensor:
    origin = at_least_float32(start)
    delta_a, delta_b = _like(a, origin) - origin, _like(b, origin) - origin
    share_a, share_b = _slerp_shares(delta_a, delta_b, t)
    return _like(origin + share_a * delta_a + share_b * delta_b, start)


def _slerp_shares(delta_a: Tensor, delta_b: Tensor, t: float) -> tuple[float, float]:
    lengths = delta_a.norm() * delta_b.norm()
    cosine = float((delta_a * delta_b).sum() / lengths)
    # Written so that NaN, the cosine of a zero delta, is linear too.
    if not abs(cosine) < NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to(device=other.device, dtype=other.dtype)


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _check_alike(target: Weights, source: Weights) -> None:
    if target.keys() != source.keys():
        missing, unexpected = _first(target.keys() - source.keys()), _first(source.keys() - target.keys())
        raise ValueError(f"weights differ in names: missing {missing}; unexpected {unexpected}")
    reshaped = [name for name, tensor in target.items() if tensor.shape != source[name].shape]
    if reshaped:
        raise ValueError(f"weights differ in shape: {_first(reshaped)}")


def _first(names: Iterable[str]) -> str:
    """Up to three of the names, in order."""
    names = sorted(names)
    return (", ".join(names[:3]) or "none") + (f" and {len(names) - 3} more" if len(names) > 3 else "")
