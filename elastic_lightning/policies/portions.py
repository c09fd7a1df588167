"""Work on rows in portions that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from elastic_lightning.errors import UserError

T = TypeVar("T")


class Portions:
    """Runs a function over rows, so many at a time; where memory does not suffice, half as many from then on.

    For work without a gradient, whose result does not depend on how it is cut.

    Args:
        size: rows at a time; all by default.
        what: is done, for the message: "scoring by the classifier".

    Attributes:
        fixed: out of memory is an error. Processes that share a model must run it equally often: none may halve alone.
    """

    def __init__(self, size: int | None, what: str) -> None:
        self.size, self.what = size, what
        self.fixed = False

    def over(self, function: Callable[..., T], *parts: Any) -> list[T]:
        """`run` of a function of tensors and named tuples of tensors, each [B, ...]; one that is None stays None."""
        return self.run(lambda rows: function(*(_take(part, rows) for part in parts)), len(parts[0][0]))

    def run(self, function: Callable[[slice], T], rows: int) -> list[T]:
        """The results of ``function(slice)`` over all rows, in order.

        Raises:
            UserError: memory does not suffice for a single row.
        """
        results: list[T] = []
        start = 0
        while start < rows:
            size = min(self.size or rows, rows - start)
            try:
                results.append(function(slice(start, start + size)))
                start += size
                continue
            except (RuntimeError, MemoryError) as error:
                if self.fixed or not out_of_memory(error):
                    raise
                if size == 1:
                    raise UserError(f"out of memory in {self.what}, for a single row: {first_line(error)}") from error
            # Here, where the exception and with it the frames that hold tensors are gone.
            self.size = size // 2
            warnings.warn(f"out of memory in {self.what}: {self.size} rows at a time from here on", stacklevel=2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


def _take(part: Any, rows: slice) -> Any:
    """Rows of a tensor, or of each of a named tuple's; None stays None."""
    if part is None or isinstance(part, Tensor):
        return None if part is None else part[rows]
    return type(part)(*(tensor[rows] for tensor in part))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: torch has a class for it on CUDA, and none on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in message or "out of memory" in message)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it says nothing."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
