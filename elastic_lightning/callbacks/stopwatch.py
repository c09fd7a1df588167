"""Time spent on a device, taken without making the CPU wait for it on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds inside ``with stopwatch.running(device):``; `read` gives the sum and starts anew.

    On CUDA the ends are events in the stream, so that only `read` waits for the GPU.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what happens inside."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def read(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        events, self._events = self._events, []
        for start, end in events:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1000
        return seconds
