"""Processes that end with the one that started them, however that ends: by SIGKILL too, which it cannot answer."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "ELASTIC_LIGHTNING_PARENT"  # in a child's environment: the process that it is to end with
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LOOK = 0.5  # seconds between two looks where the kernel does not tell


def child_environment() -> dict[str, str]:
    """What asks a child that calls `end_with_parent` to end with this process."""
    return {PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Have this process killed when the one ends that asked for it, see `child_environment`; it may have ended already.

    Linux sees to it; where it has no prctl, and elsewhere, a thread looks. A process that was started by another one in
    between, such as a shell, stays as it is.
    """
    asked = os.environ.pop(PARENT, "")  # for this process alone, not for those that it starts
    if not asked.isdecimal():
        return
    parent = int(asked)
    if os.getppid() == parent:
        if not _killed_by_kernel():
            threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    elif _lives(parent):
        return
    if os.getppid() != parent:  # it was gone before this process had a say
        os.kill(os.getpid(), signal.SIGKILL)


def _killed_by_kernel() -> bool:
    """Ask Linux to kill this process when its parent ends; whether it will."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None
    return prctl is not None and prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
