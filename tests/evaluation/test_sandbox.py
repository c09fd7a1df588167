"""Programs that do their worst: each costs its own test, and nothing else."""

import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from trials import FORK, found, processes, trial

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import sandbox
from elastic_lightning.evaluation.sandbox import Limits, Outcome, check_sandbox

pytestmark = pytest.mark.usefixtures("fences", "nothing_left")


def test_right_and_wrong():
    assert trial("def f(x): return x + 1") == Outcome(True, "passed")
    assert trial("def f(x): return x + 2") == Outcome(False, "AssertionError")
    assert trial("def f(x): return x + y").reason == "NameError: name 'y' is not defined"
    assert trial("def f(x) return x").reason.startswith("SyntaxError")
    assert trial("def g(x): return x + 1").reason == "KeyError: 'f'"
    assert trial("f = 3\nraise ValueError('as  it\\nran')").reason == "ValueError: as it ran"
    lazy = sys.version_info >= (3, 14)
    assert trial("def f(x: Unknown): return x + 1").passed == lazy, "annotations are read as python reads them"
    assert trial("def f(x): return x + 1", "def check(f): assert f(x=2) == 3 and f(True) == 2").passed
    raising = "def check(f):\n    try:\n        f(2)\n    except Exception:\n        return\n    assert False"
    assert trial("def f(x): raise ValueError", raising).passed
    for end in ("sys.exit()", "os._exit(0)", "os.write(4, b'passed')", "os.close(4)"):
        assert not trial(f"import os, sys\ndef f(x): {end}", raising).passed, "an end is no exception"
    lazy = "def f(x): return (i for i in (1, 2))"
    assert not trial(lazy, "def check(f): assert f(2) == (1, 2)").passed, "a generator equals no tuple"
    assert trial(lazy, "def check(f): assert list(f(2)) == [1, 2]").passed


def test_at_once():
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda i: trial(f"def f(x): return {i}", limits=Limits()), range(12)))
    assert [outcome.passed for outcome in outcomes] == [i == 3 for i in range(12)]


# What fakes success, each with the reason it fails for.
FAKES = {
    "os._exit as it is read": ("import os\nos._exit(0)", "ended early (exit status 0)"),
    "os._exit when asked": ("import os\ndef f(x): os._exit(0)", "ended early (exit status 0)"),
    "sys.exit as it is read": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "sys.exit when asked": ("import sys\ndef f(x): sys.exit(0)", "SystemExit: 0"),
    "SystemExit": ("def f(x): raise SystemExit", "SystemExit"),
    "KeyboardInterrupt": ("def f(x): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "an exception without a text": (
        "class E(Exception):\n    def __str__(self): raise SystemExit\ndef f(x): raise E",
        "E",
    ),
    "equal to all": (
        "class E(int):\n    def __eq__(self, other): return True\n    __ne__ = __hash__ = None\ndef f(x): return E(7)",
        "AssertionError",
    ),
    "an object": ("class E:\n    def __eq__(self, other): return True\ndef f(x): return E()", "E is no plain value"),
    "not a number": ("def f(x): return float('nan')", "AssertionError"),
    "another assert": (
        "import builtins, json\nbuiltins.AssertionError = Warning\njson.dumps = lambda _: '{\"passed\": true}'",
        "KeyError: 'value'",
    ),
    "at exit": ("import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 7", "AssertionError"),
    "a word on every file": (
        """
        import os
        for file in range(64):
            try:
                os.write(file, b'{"passed": true, "reason": "passed"}\\n')
            except OSError:
                pass
        def f(x): return 7
        """,
        "KeyError: 'value'",
    ),
    "answers before they are asked for": (
        "import os\nfor _ in range(9): os.write(4, b'{\"value\": null}\\n')\ndef f(x): return 7",
        "AssertionError",
    ),
    "no JSON": ("import os\nos.write(4, b'passed\\n')\ndef f(x): return 7", "JSONDecodeError"),
    "a deep answer": ("import os\nos.write(4, b'[' * 10**6 + b'\\n')\ndef f(x): return 7", "RecursionError"),
    "closed files": ("import os, time\nos.closerange(0, 99)\ntime.sleep(60)", "ended early (SIGKILL)"),
}

# What takes more than its share.
GREEDY = {
    "an endless loop": ("while True: pass", "ended early (SIGKILL)"),
    "an endless loop when asked": ("def f(x):\n    while True: pass", "ended early (SIGKILL)"),
    "a loop deaf to signals": (
        "import signal\nfor i in (2, 3, 15, 24): signal.signal(i, signal.SIG_IGN)\nwhile True: pass",
        "ended early (SIGKILL)",
    ),
    "a memory bomb": ("def f(x): return len(bytearray(2**40)) and x + 1", "MemoryError"),
    "a memory bomb in steps": ("kept = []\nwhile True: kept.append(bytearray(2**20))", "MemoryError"),
    "an endless answer": ("import itertools\ndef f(x): return itertools.repeat(x)", "SIGKILL"),
    "a long answer": ("def f(x): return 'x' * 2**25", "a line of more than"),
    "a gigabyte of answers": (
        "import os\nline = b'x' * 2**20\nfor _ in range(1024): os.write(4, line)\ndef f(x): return 3",
        "a line of more than",
    ),
    "prints without end": ("while True: print('x' * 2**20)", "ended early (SIGKILL)"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "ended early (SIGSEGV)"),
}


@pytest.mark.parametrize(("program", "reason"), [*FAKES.values(), *GREEDY.values()], ids=[*FAKES, *GREEDY])
def test_fails_alone(program, reason):
    outcome = trial(program)
    assert not outcome.passed
    assert reason in outcome.reason
    assert len(outcome.reason) < 300


def test_sleep_ends_at_the_wall_clock():
    began = time.monotonic()
    outcome = trial("import time\ntime.sleep(60)", limits=Limits(wall_seconds=0.5))
    assert outcome == Outcome(False, "timed out after 0.5 s")
    assert time.monotonic() - began < 5


def test_printing_a_gigabyte_costs_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB
    program = "import sys\nfor _ in range(1024):\n    print('x' * 2**20)\n    sys.stderr.write('y' * 2**10)\n"
    assert trial(program + "def f(x): return x + 1", limits=Limits(wall_seconds=60, cpu_seconds=30)).passed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("allowed", [1, 3])
def test_process_limit_binds(allowed):
    found(FORK, [allowed - 1, 11], limits=Limits(processes=allowed))


@pytest.mark.parametrize("allowed", [1, 8])
def test_fork_bomb(allowed):
    found(FORK, [allowed - 1, 11], limits=Limits(processes=allowed))  # before the bomb: the limit binds
    program = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    most = []
    done = threading.Event()

    def count():
        while not done.wait(0.02):
            most.append(len(processes()))

    before = len(processes())
    counting = threading.Thread(target=count)
    counting.start()
    outcome = trial(program, limits=Limits(wall_seconds=2, cpu_seconds=1, processes=allowed))
    done.set()
    counting.join()
    assert not outcome.passed
    assert max(most) - before <= 3 + allowed  # doorkeeper, warden, judge, and the program's


def test_threads_count_as_processes():
    program = """
        import threading, time
        def f():
            started = 0
            try:
                for _ in range(8):
                    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                    started += 1
            except RuntimeError:
                return started
    """
    found(program, 2, limits=Limits(processes=3))


def test_background_processes_die_with_the_program():
    program = """
        import os, time
        def f(x):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    while True:
                        time.sleep(0.01)
                os._exit(0)
            os.wait()
            return x + 1
    """
    before = processes()
    assert trial(program, limits=Limits(processes=4)).passed
    assert processes() <= before


# Where the kernel grants no namespaces -------------------------------------------------------------------------------


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="without namespaces only root may run programs")


def test_missing_fences_are_never_accepted_of_anybody_but_root(without_namespaces, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="would run as you"):
        trial("def f(x): return x + 1", accept_missing_fences=True)


@AS_ROOT
def test_missing_fences_are_refused(without_namespaces):
    with pytest.raises(UserError, match="no namespaces here; or accept it with accept_missing_fences"):
        trial("def f(x): return x + 1")
    with pytest.raises(UserError, match=r"limits.processes must be 1"):
        trial("def f(x): return x + 1", limits=Limits(processes=2), accept_missing_fences=True)


@AS_ROOT
def test_accepted_without_namespaces(without_namespaces):
    def accepted(program):
        return trial(program, accept_missing_fences=True)

    assert accepted("def f(x): return x + 1").passed
    assert accepted("import os\ndef f(x): os._exit(0)").reason == "the program ended early (exit status 0)"
    assert accepted("while True: pass").reason == "the program ended early (SIGKILL)"
    for call in ("os.fork()", "os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.execv('/bin/true', ['true'])"):
        assert accepted(f"import os\ndef f(x): {call}").reason.startswith(("PermissionError", "BlockingIOError"))


UNFENCED = {  # what ended the whole evaluation, or stayed, each with the reason that one sample fails for
    "a timer with a real-time signal": (
        """
        import ctypes
        libc, event, timer = ctypes.CDLL(None), (ctypes.c_int * 16)(0, 0, 40, 0), ctypes.c_void_p()
        libc.timer_create(1, event, ctypes.byref(timer))
        libc.timer_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 1_000_000), None)
        while True: pass
        """,
        "the program ended early (signal 40)",
    ),
    "a folder 3,000 levels deep": (
        """
        import os
        for _ in range(3000):
            os.mkdir("deeper")
            os.chdir("deeper")
        def f(x): return x + 1
        """,
        "its files were more than 65536 bytes, or than 256",
    ),
    "many files": (
        "for i in range(9):\n    with open(str(i), 'wb') as file: file.write(bytes(2**14))\ndef f(x): return x + 1",
        "its files were more than 65536 bytes, or than 256",
    ),
    "files without end": (
        "i = 0\nwhile True:\n    i += 1\n    with open(str(i), 'wb') as file: file.write(bytes(2**14))",
        "its files were more than 65536 bytes, or than 256",
    ),
}


@AS_ROOT
@pytest.mark.parametrize(("program", "reason"), UNFENCED.values(), ids=UNFENCED)
def test_without_namespaces_one_sample_fails(without_namespaces, program, reason):
    began = time.monotonic()
    limits = Limits(file_bytes=2**16, cpu_seconds=30, wall_seconds=30)
    assert trial(program, limits=limits, accept_missing_fences=True) == Outcome(False, reason)
    assert time.monotonic() - began < 20


@AS_ROOT
def test_without_namespaces_nothing_stays(without_namespaces, tmp_path):
    """Not even where all the world may write; the working folder and /dev/null are the program's."""
    public, shared = tmp_path / "public", tmp_path / "public/shared"
    public.mkdir()
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    shared.write_text("years of work")
    public.chmod(0o777), shared.chmod(0o666)
    program = f"""
        import os
        def attempt(action, *arguments):
            try:
                action(*arguments)
            except OSError as error:
                return error.errno
        def f():
            name = "sandbox-test-" + os.urandom(8).hex()
            places = ["/tmp", "/var/tmp", "/dev/shm", {str(public)!r}]
            made = [attempt(how, place + "/" + name) for place in places for how in (os.mkdir, os.mkfifo)]
            open("mine", "w").write("a")
            moved = attempt(os.rename, "mine", "/tmp/" + name), attempt(os.link, "mine", "/tmp/" + name)
            old = attempt(open, {str(shared)!r}, "a"), attempt(os.truncate, {str(shared)!r}, 0)
            os.mkdir("inner"), os.rename("mine", "inner/mine")
            return set(made), None in moved, old, open("inner/mine").read(), open(os.devnull, "w").write("b")
    """
    found(program, ({13}, False, (13, 13), "a", 1), accept_missing_fences=True)
    assert shared.read_text() == "years of work" and list(public.iterdir()) == [shared]


@AS_ROOT
def test_tricks_in_the_folder(without_namespaces, tmp_path):
    """Links out of it, folders that cannot be read: it is removed, and nothing else."""
    victim = tmp_path / "victim"
    (victim / "inner").mkdir(parents=True)
    victim.chmod(0o755)
    (victim / "inner/file").write_text("years of work")
    program = f"""
        import os
        os.symlink({str(victim)!r}, "link")
        os.makedirs("deep/er")
        os.symlink({str(victim / "inner/file")!r}, "deep/er/link")
        os.symlink("..", "deep/up")
        open("deep/file", "w").close()
        os.chmod("deep/er", 0)
        os.chmod("deep", 0)
        os.chmod(".", 0)
        def f(x): return x + 1
    """
    assert trial(program, accept_missing_fences=True).passed
    assert (victim / "inner/file").read_text() == "years of work"
    assert victim.stat().st_mode & 0o777 == 0o755


def test_unknown_machine_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "missing_fences", lambda: "")
    monkeypatch.setattr(
        sandbox, "START", sandbox.START.replace("main()", "__import__('jail').linux.MACHINES.clear(); main()")
    )
    with pytest.raises(UserError, match="system calls are known for 64-bit"):
        trial("def f(x): return x + 1")


def test_check_sandbox():
    check_sandbox()
    with pytest.raises(UserError, match="raise the limits"):
        check_sandbox(Limits(memory_bytes=2**22))
    with pytest.raises(UserError, match=r"limits.cpu_seconds must be above 0"):
        Limits(cpu_seconds=0)
