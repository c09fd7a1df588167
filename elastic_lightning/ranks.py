"""Several processes as one: their rows, their sums, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elastic_lightning.errors import NotFinite, UserError

Result = TypeVar("Result")


def rows_of_ranks(rows: int) -> list[int]:
    """How many rows each rank has, each saying how many it has itself."""
    if not several():
        return [rows]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    counts[dist.get_rank()] = rows
    return sum_of_ranks(counts).tolist()


def any_rank(values: Tensor) -> bool:
    """Whether any value is true on any rank."""
    return bool(max_of_ranks(values.any().to(torch.int32)))


def alike(work: Callable[[], Result]) -> Result:
    """What `work` returns; where it raises on one rank, all raise, and none waits for one that is gone.

    `work` is this rank's own: it must not wait for the others.

    Raises:
        NotFinite: what `work` raised, or that it did so on another rank.
        UserError: `work` raised something else on another rank.
    """
    error, result = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    own = 0 if error is None else 1 if isinstance(error, NotFinite) else 2
    try:
        worst = int(max_of_ranks(torch.tensor(own)))
    except Exception as lost:  # another process is gone, or the device: what was wrong here says more
        raise error or lost from lost
    if worst > own and worst == 1:
        raise NotFinite("reward", "on another rank")
    if worst > own:
        raise UserError("another process cannot go on, and says why") from error
    if error is not None:
        raise error
    return result


def gather(tensor: Tensor, left: bool = False) -> Tensor:
    """The rows [B, L, ...] of all ranks in their order, filled up with zeros to the longest L of any (or [B] alone).

    Args:
        tensor: of this rank: its B and L may be its own, what follows is that of all.
        left: fill up on the left.
    """
    shapes = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64)
    shapes[dist.get_rank()] = torch.tensor(tensor.shape[:2] if tensor.dim() > 1 else (len(tensor), 0))
    shapes = sum_of_ranks(shapes)
    rows, length = shapes[:, 0].tolist(), int(shapes[:, 1].max())
    if tensor.dim() > 1:
        missing = length - tensor.shape[1]
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + ((missing, 0) if left else (0, missing)))
    whole = tensor.new_zeros(max(rows), *tensor.shape[1:])
    whole[: len(tensor)] = tensor
    parts = [torch.empty_like(whole) for _ in rows]
    dist.all_gather(parts, whole)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_of_ranks(values: Tensor) -> Tensor:
    """The sum over ranks, element by element, of a tensor of one shape on all."""
    return _reduced(values, "SUM")


def max_of_ranks(values: Tensor) -> Tensor:
    """The largest over ranks, element by element, of a tensor of one shape on all."""
    return _reduced(values, "MAX")


def mean_of_ranks(value: float) -> float:
    """The mean over ranks of a number that each has."""
    if not several():
        return value
    return (sum_of_ranks(torch.tensor([value], dtype=torch.float64)) / dist.get_world_size()).item()


def objects_of_ranks(value: Any) -> list[Any]:
    """What each rank has, in their order, on all; it is sent as a pickle."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _reduced(values: Tensor, how: str) -> Tensor:
    if not several():
        return values
    # NCCL wants it on this rank's device.
    here = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else values.device
    reduced = values.detach().to(here, copy=True)
    dist.all_reduce(reduced, getattr(dist.ReduceOp, how))
    return reduced.to(values.device)
