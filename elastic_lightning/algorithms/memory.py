"""What a run holds in memory between its steps: freed pages of a CPU."""

from __future__ import annotations

import ctypes
import os

from lightning import Trainer

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # parameters of glibc's mallopt, from malloc.h
ENVIRONMENT = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"}


def keep_memory_of_fit(trainer: Trainer, stage: str) -> None:
    """`keep_freed_memory` where a training on the CPU begins."""
    if stage == "fit" and trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for the tensors to come; returns whether its allocator could be told so.

    A step of training allocates and frees the same large tensors again and again. By default glibc gives each back to
    the system, which hands it out anew a page at a time, filled with zeros: up to a fifth of a PPO batch's time on a
    CPU. From here on the process holds what it needed at its peak. Other C libraries have no such switch, and
    where the environment sets one of glibc's (`ENVIRONMENT`, ``GLIBC_TUNABLES``) it is left to decide all of them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or tuned or ENVIRONMENT & os.environ.keys():
        return False
    return all(mallopt(*setting) for setting in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)))
