"""Signals that ask a process to go: from its first line on each unwinds it, and is said in one line."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
RAISED_FOR: list[signal.Signals] = []  # in this process: imports may swallow what is raised in them
WORKING: list[bool] = []  # not empty while there is something to clean up
PAUSE = 3.0  # seconds in which a signal that comes again says nothing new


class Interrupted(SystemExit):
    """A signal ended the work where nothing could be saved. `code` is 130 after Ctrl-C, and 1 after the others."""

    def __init__(self, number: int) -> None:
        super().__init__(130 if number == signal.SIGINT else 1)
        self.signal = signal.Signals(number)
        self.text = f"stopped by {self.signal.name}"

    def __str__(self) -> str:
        return self.text


@contextmanager
def unwinding(numbers: tuple[signal.Signals, ...], process: bool = False) -> Iterator[None]:
    """Within this context each of these signals raises `Interrupted`, or `KeyboardInterrupt` where it is SIGINT alone.

    A process forked from this one, such as a worker of a data loader, leaves it to this one.

    Args:
        numbers: of the signals.
        process: this process ends with the context: until `working` it ends at once, for raised in an import of C++ an
            exception aborts it; afterwards signals are ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread alone
        yield
        return
    own, last = os.getpid(), -PAUSE

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != own or time.monotonic() - last <= PAUSE:
            return
        last = time.monotonic()
        stop = Interrupted(number)
        if process and not WORKING and len(numbers) > 1:
            os.write(2, f"error: {stop}\n".encode())
            os._exit(stop.code)
        RAISED_FOR.append(stop.signal)
        raise KeyboardInterrupt if numbers == (signal.SIGINT,) else stop

    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # not in the background
    before = {number: signal.signal(number, answer) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if process else handler)


@contextmanager
def working() -> Iterator[None]:
    """Within this context there is something to clean up, or to save."""
    WORKING.append(True)
    try:
        yield
    finally:
        WORKING.pop()
