"""Builds the sandbox round two processes, the program and its judge, lets them talk, and ends them.

    parent -> doorkeeper (enters namespaces) -> warden (first of a process namespace; keeps the time)
                                                  |-> judge (runs the tests, as one user)
                                                  `-> program (first of another process namespace, as another user)

All four are forks of one fresh interpreter. What the program is not to know, the tests, is read after the fork.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from . import fences, judge, linux

VERDICT_BYTES = 65_536
GLANCE = 0.02  # seconds between two looks at what the program has written


def main() -> None:
    """Read a job from stdin, run it, and write the verdict to stdout; errors of the sandbox itself go to stderr.

    The job is its length in eight bytes, then JSON: `source`, `entry_point`, `limits`, `folder` (an empty one),
    `parent` (process id) and `namespaces` (whether to enter them). After that, up to the end, comes the test.
    """
    job = json.loads(_read(0, int.from_bytes(_read(0, 8), "big")))
    _die_with_parent()
    if os.getppid() != job["parent"]:
        return
    os.umask(0o022)
    sys.dont_write_bytecode = True
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, it is to be taken from these
    user = fences.spare_user()
    if job["namespaces"]:
        fences.enter_namespaces()
        fences.enter_own_root(job["folder"], os.geteuid() if user is None else user, job["limits"]["file_bytes"])
        os.waitpid(_fork(lambda: _watch(job, user)), 0)
        return
    if user is not None:
        os.chown(job["folder"], user, user)
    os.chdir(job["folder"])
    _watch(job, user)


def _watch(job: dict[str, Any], user: int | None) -> None:
    """The warden: start both sides, wait for the verdict or the end of the time, kill both, and tell."""
    _die_with_parent()
    calls, replies, verdict = os.pipe(), os.pipe(), os.pipe()
    judging = _fork(lambda: _judge(job, user, calls[1], replies[0], verdict[1]))
    if job["namespaces"]:
        linux.call("unshare", linux.CLONE_NEWPID)
    program = _fork(lambda: _serve(job, user, calls[0], replies[1]))
    for descriptor in (*calls, *replies, verdict[1]):
        os.close(descriptor)
    seconds = job["limits"]["wall_seconds"]
    room = job["limits"]["file_bytes"]
    full = (lambda: False) if job["namespaces"] else (lambda: fences.overfull(job["folder"], room))
    said = _read_until(verdict[0], time.monotonic() + seconds, full)
    status, _ = [_end(process) for process in (program, judging)]
    if full():
        result = {"passed": False, "reason": f"its files were more than {room} bytes, or than {fences.FILES}"}
    elif said is None:
        result = {"passed": False, "reason": f"timed out after {seconds:g} s"}
    elif not said:
        result = {"passed": False, "reason": "the test ended early, killed at a limit"}
    else:
        result = json.loads(said)
    if result["reason"] == judge.ENDED:
        result["reason"] += f" ({status})"
    os.write(1, json.dumps(result).encode())


def _judge(job: dict[str, Any], user: int | None, calls: int, replies: int, verdict: int) -> None:
    test = _read(0).decode()
    calls, replies, verdict = _keep_only(calls, replies, verdict)
    fences.confine(None if user is None else user + 1, job["limits"], 1, _writable(job))
    _silence()
    os.write(verdict, json.dumps(judge.judge(test, job["entry_point"], calls, replies)).encode())


def _serve(job: dict[str, Any], user: int | None, calls: int, replies: int) -> None:
    os.setsid()
    calls, replies = _keep_only(calls, replies)
    # In a user namespace of one user, the doorkeeper, the warden and the judge count too.
    others = 3 if job["namespaces"] and user is None else 0
    fences.confine(user, job["limits"], job["limits"]["processes"] + others, _writable(job))
    _silence()
    judge.serve(job["source"], job["entry_point"], calls, replies)


def _writable(job: dict[str, Any]) -> str | None:
    """The working folder where it is no file system of its own; permissions keep the judge out of it."""
    return None if job["namespaces"] else job["folder"]


def _fork(action: Callable[[], object]) -> int:
    """Run `action` in a child process, which then ends; returns its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return process


def _die_with_parent() -> None:
    linux.call("prctl", linux.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end(process: int) -> str:
    """Kill a process, with all in its namespace if it is the first there, and wait; how it ended."""
    os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code >= 0:
        return f"exit status {code}"
    known = [number.name for number in signal.Signals if number == -code]  # real-time signals have no names
    return known[0] if known else f"signal {-code}"


def _keep_only(*descriptors: int) -> list[int]:
    """Move these to 3, 4 and so on, and close all others but 0, 1 and 2."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 16) for descriptor in descriptors]
    kept = [os.dup2(descriptor, number, inheritable=False) for number, descriptor in enumerate(high, start=3)]
    os.closerange(3 + len(kept), os.sysconf("SC_OPEN_MAX"))
    return kept


def _silence() -> None:
    """Nothing to read, and what is printed goes nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _read(descriptor: int, size: int | None = None) -> bytes:
    """`size` bytes, or all to the end: not one more, which would be missing in another process."""
    data = b""
    while size is None or len(data) < size:
        chunk = os.read(descriptor, 65_536 if size is None else size - len(data))
        if not chunk:
            break
        data += chunk
    return data


def _read_until(descriptor: int, deadline: float, stop: Callable[[], bool]) -> bytes | None:
    """All to the end, as far as it may be long; None when it does not end in time, or `stop` says so before."""
    data = b""
    while len(data) < VERDICT_BYTES:
        left = deadline - time.monotonic()
        if not select.select([descriptor], [], [], min(max(0.0, left), GLANCE))[0]:
            if left <= 0 or stop():
                return None
            continue
        chunk = os.read(descriptor, VERDICT_BYTES)
        if not chunk:
            break
        data += chunk
    return data
