"""An average kept in CPU memory, moved there while the device goes on training."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from elastic_lightning.functional import copy_, lerp_


class OffloadedAverage:
    """Moves `ema` on the CPU towards `online` on a device, one step an `update`, without holding the device up.

    On CUDA the weights are copied into pinned memory on a stream of their own, and a thread adds them to the average
    once they have arrived. The weights must not change before they are copied: an optimizer is made to wait for that
    by its `before_step` hook, on the device. Elsewhere the same happens without streams.

    Args:
        online: the weights that are trained, by name.
        ema: their average, float32 on the CPU, by the same names.
        weight: of the online weights in one step.
    """

    def __init__(self, online: dict[str, Tensor], ema: dict[str, Tensor], weight: float) -> None:
        self.online, self.ema, self.weight = online, ema, weight
        self.device = next(iter(online.values())).device
        self.arrived: dict[str, Tensor] = {}
        self._make_room(online)
        cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        self.copied: torch.cuda.Event | None = None
        # A thread starts on GPU 0, and would open a context there beside that of the GPU it works for.
        start = {"initializer": torch.cuda.set_device, "initargs": (self.device,)} if cuda else {}
        self.thread = ThreadPoolExecutor(1, "average", **start)
        self.pending: Future | None = None

    def update(self, names: Iterable[str] | None = None) -> None:
        """Start one step of the average of these weights, or of all; the one before is then complete."""
        self.wait()
        leaving = {name: self.online[name] for name in (self.online if names is None else names)}
        self._make_room(leaving)
        arriving = {name: self.arrived[name] for name in leaving}
        if self.stream is None:
            copy_(arriving, leaving)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream), torch.no_grad():
                for name, tensor in leaving.items():
                    arriving[name].copy_(tensor, non_blocking=True)
                self.copied = torch.cuda.Event(blocking=True)  # the thread sleeps until it is there
                self.copied.record()
        self.pending = self.thread.submit(self._move, arriving)

    def before_step(self) -> None:
        """Before the weights change on the device: its stream waits until they are copied."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)

    def wait(self) -> None:
        """Return when the average has taken its last step."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self, failed: bool = False) -> None:
        """Finish the last step and end the thread; its error is raised, unless something has `failed` already."""
        self.thread.shutdown()
        if not failed:
            self.wait()

    def _move(self, arriving: dict[str, Tensor]) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        lerp_({name: self.ema[name] for name in arriving}, arriving, self.weight)

    def _make_room(self, weights: dict[str, Tensor]) -> None:
        """Where weights arrive; those that join later have none yet."""
        for name, tensor in weights.items():
            if name not in self.arrived:
                pinned = self.device.type == "cuda"
                self.arrived[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
