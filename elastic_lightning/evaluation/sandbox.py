"""Runs a program that nobody has read: at worst it fails its test."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from elastic_lightning.errors import UserError

GRACE = 20.0  # seconds to build and tear down a sandbox, beside the program's own
START = "import sys; sys.path.append(sys.argv.pop()); from jail.warden import main; sys.path.pop(); main()"


@dataclass(frozen=True)
class Limits:
    """What a program, and each process that it starts, may use.

    Attributes:
        wall_seconds: from its start to the verdict; generous, for a busy machine.
        cpu_seconds: of computing; what the published harness grants.
        memory_bytes: of address space.
        file_bytes: of one file, and of its working folder.
        processes: at one time, threads included; 1 is the program alone.
    """

    wall_seconds: float = 15.0
    cpu_seconds: int = 3
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 2**20
    processes: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = 2**62 if name.endswith("_bytes") else 10**6  # what the system's calls can be told
            if not 0 < value <= most:
                raise UserError(f"limits.{name} must be above 0 and at most {most}, got {value}")


class Outcome(NamedTuple):
    """Whether the test passed, and if not why: one short line, which the program may have written."""

    passed: bool
    reason: str


def run_program(
    source: str, test: str, entry_point: str, limits: Limits | None = None, accept_missing_fences: bool = False
) -> Outcome:
    """Run python source, then a test of the function it defines; may be called from several threads at once.

    The test, which is trusted, runs in an interpreter of its own: `test` defines ``check(candidate)``, and its
    `candidate`, also known by the name `entry_point`, calls the program's function through a pipe. Arguments and
    results cross it as plain data (None, numbers, text, lists, tuples, sets, dicts); only what `check` itself computes
    from them decides. So nothing that the program does to its own interpreter, and no way in which it ends, passes a
    test: it has to return right values. It cannot read the test either. What is left to it is to know the values, or
    a fault of the kernel. Not as in one interpreter: what it changes in its arguments is not seen by the test, and
    results of other types, such as arrays, fail.

    The program has python's standard library, and
    - a root folder of its own: python and system libraries, read-only, and a working folder of `file_bytes` in memory,
      which is gone afterwards; no other file, no /proc
    - no network, and no sockets at all; no shared memory or signals that reach others
    - limits on time, computing, memory, file size, files and processes; no core dumps
    - process ids of its own: it sees no others, and when the first ends, all end
    - a user id that nobody else has (where this is root; otherwise one user in a user namespace, without rights)
    - no privileges to gain, and a filter on system calls (no exec, ptrace, mount, new namespaces, ...)
    - no open files but /dev/null and the two pipes, and no environment variables of the parent

    Args:
        source: the program.
        test: python source that defines ``check``.
        entry_point: name of the function to test.
        limits: what the program and the test may use.
        accept_missing_fences: run also where the kernel grants no namespaces, see `missing_fences`, but only as
            root: the program then sees the files that a user sees whom nobody else is, and writes in its working
            folder alone (Landlock, Linux 5.13), whose size is looked at every 20 ms. As anybody else it would run as
            *you*, and could write to this process's memory.

    Raises:
        UserError: fences are missing on this machine, and that is not accepted, or this is not root.
    """
    limits = limits or Limits()
    missing = missing_fences()
    if missing and not accept_missing_fences:
        raise UserError(f"{missing}; or accept it with accept_missing_fences")
    if missing and os.geteuid() != 0:
        raise UserError(f"{missing}; accept_missing_fences is for root, for anybody else's programs would run as you")
    if missing and limits.processes > 1:
        raise UserError(f"{missing}: then limits.processes must be 1")
    try:
        return _run(source, test, entry_point, limits, namespaces=not missing)
    except SandboxError as error:
        raise UserError(f"the sandbox cannot be built here: {error}") from error


@functools.cache
def missing_fences() -> str:
    """Which fences the kernel does not grant this process, and what to do; empty where it grants all. Asked once."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"programs are run in a sandbox of Linux: it cannot be built on {sys.platform}")
    try:
        _run("def f(): pass", "def check(f): f()", "f", Limits(), namespaces=True)
    except SandboxError as error:
        return (
            f"the kernel does not let a sandbox have files, processes and network of its own ({error}): run as root "
            "with the right to make namespaces, or allow user namespaces"
        )
    return ""


def check_sandbox(limits: Limits | None = None, accept_missing_fences: bool = False) -> None:
    """Raise a `UserError` where a right program would not pass: fences missing, no standard library, tight limits."""
    right = "import collections, hashlib, heapq, itertools, math, random, re, typing\ndef f(x): return math.sqrt(x)"
    outcome = run_program(right, "def check(f): assert f(4) == 2", "f", limits, accept_missing_fences)
    if not outcome.passed:
        raise UserError(f"a program that is right does not pass in the sandbox ({outcome.reason}): raise the limits")


class SandboxError(Exception):
    """The sandbox could not be built."""


def _run(source: str, test: str, entry_point: str, limits: Limits, namespaces: bool) -> Outcome:
    with _folder() as folder:
        job = {
            "source": source,
            "entry_point": entry_point,
            "limits": asdict(limits),
            "folder": folder,
            "parent": os.getpid(),
            "namespaces": namespaces,
        }
        head = json.dumps(job).encode()
        output, errors = _communicate(len(head).to_bytes(8, "big") + head + test.encode(), limits.wall_seconds + GRACE)
    if errors:
        raise SandboxError(errors.decode(errors="replace").strip().split("\n")[-1])
    if not output:
        return Outcome(False, "the sandbox did not answer")
    return Outcome(**json.loads(output))


def _communicate(job: bytes, seconds: float) -> tuple[bytes, bytes]:
    """What the sandbox writes to stdout and stderr; both empty where it had to be killed."""
    # Isolated: no environment, no site-packages. With a clean environment, as the program could find it in memory.
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-X", "utf8", "-c", START, str(Path(__file__).parent)]
    variables = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=variables, cwd="/", start_new_session=True, **pipes)
    try:
        return process.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        return b"", b""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """An empty folder, removed with what a program left in it, whatever depth and links that has.

    Where an inner folder holds something, this is moved up before: so no path is too long, and nothing recurses.
    """
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield folder
    finally:
        names = (f"{folder}/{secrets.token_hex(16)}" for _ in itertools.count())  # none that a program could know
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                for inner in os.listdir(entry.path):
                    os.rename(f"{entry.path}/{inner}", next(names))
                os.rmdir(entry.path)
        os.rmdir(folder)
