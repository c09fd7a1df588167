"""Programs on trial in the sandbox: what its tests have in common."""

import contextlib
import textwrap
import time
from pathlib import Path

from elastic_lightning.evaluation import sandbox
from elastic_lightning.evaluation.sandbox import Limits, run_program

HERE = str(Path(sandbox.__file__).parent).encode()  # another checkout's tests may be running

ADD_ONE = "def check(candidate):\n    assert candidate(2) == 3\n"
SMALL = Limits(wall_seconds=60, cpu_seconds=1, memory_bytes=2**28)


def trial(program, test=ADD_ONE, limits=SMALL, **options):
    return run_program(textwrap.dedent(program), test, "f", limits, **options)


def found(program, expected, limits=SMALL, **options):
    """Assert what `program`, whose f takes no arguments, finds inside."""
    outcome = trial(
        program,
        f"def check(candidate):\n    found = candidate()\n    assert found == {expected!r}, found",
        limits,
        **options,
    )
    assert outcome.passed, outcome.reason


def processes():
    """The ids of all sandbox processes that this checkout has started."""
    commands = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            commands[int(path.parent.name)] = path.read_bytes()
    return {process for process, command in commands.items() if b"jail.warden" in command and HERE in command}


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


FORK = """
    import os, time
    def f():
        children = []
        for _ in range(8):
            try:
                child = os.fork()
            except OSError as error:
                return [len(children), error.errno]
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
        return [len(children), 0]
"""
