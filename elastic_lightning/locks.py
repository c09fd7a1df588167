"""One writer of a folder at a time: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic_lightning.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none: there nobody is kept out
    fcntl = None

LOCK = ".elastic-lightning.lock"  # in the folder while it is held; what a killed process leaves holds nobody back
LOOK = 0.1  # seconds between two tries
HELD: set[int] = set()  # descriptors of this process's locks

if hasattr(os, "register_at_fork"):
    # A lock lives as long as one copy of its descriptor, and a worker forked from a killed process has one for a while.
    os.register_at_fork(after_in_child=lambda: [os.close(HELD.pop()) for _ in range(len(HELD))])


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Be the only one who writes into a folder, which is made where there is none and, where it is empty, removed.

    Args:
        folder: to be held. What file system has no locks, and Windows, keeps nobody out.
        what: this process is, for those it keeps out.

    Raises:
        UserError: another process holds it, and which.
    """
    if fcntl is None:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = None
    try:
        lock = _acquire(folder, what)
        yield
    finally:
        if lock is not None:
            _release(folder / LOCK, lock)
        for path in missing:
            with suppress(OSError):  # it is not empty, or gone
                path.rmdir()


def wait_until_free(folder: Path, patience: float = 0.0) -> None:
    """Give whoever holds a folder so many seconds to end.

    Raises:
        UserError: it is held still, and by whom.
    """
    deadline = time.monotonic() + patience
    while fcntl is not None:
        try:
            lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # nobody ever held it, or it cannot be told
            return
        try:
            if _lock(lock):
                return
            if time.monotonic() > deadline:
                raise _held(folder, lock)
        finally:
            os.close(lock)
        time.sleep(LOOK)


def _acquire(folder: Path, what: str) -> int:
    """The descriptor of the lock, which is held."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror} ({path})") from error
        try:
            if not _lock(lock):
                raise _held(folder, lock)
            if _is(path, lock):
                break
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # who held it removed it just then
    HELD.add(lock)
    holder = {"process": os.getpid(), "host": socket.gethostname(), "what": what, "since": time.strftime("%F %T")}
    with suppress(OSError):  # a full disk: it is held, and does not say by whom
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(holder).encode(), 0)
    return lock


def _release(path: Path, lock: int) -> None:
    if lock not in HELD:  # in a process forked from the one that held it
        return
    if _is(path, lock):
        path.unlink()
    HELD.discard(lock)
    os.close(lock)


def _lock(lock: int) -> bool:
    """Lock an open file, if nobody else has."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(f"note: this file system has no locks ({error.strerror}): nobody is kept from writing here too")
    return True


def _is(path: Path, lock: int) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(lock), path.lstat())
    except FileNotFoundError:
        return False


def _held(folder: Path, lock: int) -> UserError:
    """What to say of a folder whose lock another process has."""
    who = "another process"
    with suppress(ValueError, KeyError, TypeError):  # it has just begun, or the file is not of ours
        holder = json.loads(os.pread(lock, 4096, 0))
        process, host, what, since = (str(holder[key])[:80] for key in ("process", "host", "what", "since"))
        who = f"process {process} on {host} ({what}, since {since})"
    return UserError(f"{who} writes to {folder}: wait until it ends, or end it")
