"""Capturing a step of work in a CUDA graph."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from elastic_lightning.errors import UserError
from elastic_lightning.policies.portions import first_line, out_of_memory

WARM_UPS = 3  # runs before the capture, in which libraries allocate their workspaces


def captured(step: Callable[[], None], place: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """A graph of `step`, on the current device, after trial runs; None where it waits for the device in its midst.

    `place` puts everything at the start before each run, and is called at the end too. What the step reads and writes
    has been allocated before.

    Raises:
        UserError: the step cannot be captured for another reason.
    """
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            place()
            step()
        place()
        waits = _waits(step)
        place()
    torch.cuda.current_stream().wait_stream(stream)
    if waits:
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        # Only this thread is watched: others copy averages, pin batches or look after NCCL meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise UserError(f"decoding cannot be captured ({first_line(error)}): set cuda_graphs: false") from error
    return graph


@contextmanager
def fit_for_capture(device: torch.device) -> Iterator[None]:
    """Within this context what is made can be kept and captured.

    Buffers born in inference mode, in which Lightning validates, could not be written to in training. Weights that
    autocast has cast and keeps would be read by a graph after they have changed, or are gone.
    """
    dtype = autocast_dtype(device)
    cast = torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)
    with torch.inference_mode(False), torch.no_grad(), cast:
        yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in, None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures on a device: with each stream cuBLAS keeps a workspace of up to 32 MB for good."""
    return torch.cuda.Stream(device)


def _waits(step: Callable[[], None]) -> bool:
    """Whether a step asks the device for a number, which no capture survives. The step may end half-way."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*prototype feature.*")
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False
