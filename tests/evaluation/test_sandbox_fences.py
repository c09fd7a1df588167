"""What a program in the sandbox can neither see nor change."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from trials import ADD_ONE, FORK, found, processes, trial, wait_until

from elastic_lightning.evaluation import sandbox
from elastic_lightning.evaluation.sandbox import Limits, Outcome

pytestmark = pytest.mark.usefixtures("fences", "nothing_left")


def test_no_secrets(monkeypatch):
    monkeypatch.setenv("API_TOKEN", "hunter2")
    program = """
        import os
        def f():
            return [name for name in os.environ if name not in ("LC_CTYPE", "LD_LIBRARY_PATH")]
    """
    found(program, [])
    program = """
        import ctypes
        def f():
            libc = ctypes.CDLL(None)
            libc.getenv.restype = ctypes.c_char_p
            return libc.getenv(b"API_TOKEN")
    """
    found(program, None)


def test_no_files_but_its_own(tmp_path):
    """Files of the parent that are left to inherit: the program has only /dev/null and its pipes."""
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        program = """
            import os
            def f():
                numbers = []
                for number in range(4096):
                    try:
                        os.fstat(number)
                        numbers.append(number)
                    except OSError:
                        pass
                null = os.stat("/dev/null").st_rdev
                return [numbers, all(os.fstat(number).st_rdev == null for number in (0, 1, 2)), os.read(0, 9)]
        """
        found(program, [[0, 1, 2, 3, 4], True, b""])


def test_the_test_is_out_of_reach():
    """The program finds its own text in its memory, and not that of the test."""
    program = """
        import ctypes, os, re
        # what is here to be found
        libc = ctypes.CDLL(None)
        libc.sbrk.restype, libc.write.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        def f():
            near, far = os.pipe()
            found = [0, 0]
            for middle in (id(found), libc.sbrk(0)):
                for page in range((middle & -4096) - 2**25, middle + 2**25, 4096):
                    if libc.write(far, page, 4096) == 4096:  # EFAULT where there is no memory
                        data = os.read(near, 4096)
                        found[0] += len(re.findall(b"what is here[ ]to be found", data))
                        found[1] += len(re.findall(b"what is not here[ ]to be found", data))
            return found[0] > 0, found[1]
    """
    test = "def check(candidate):\n    # what is not here to be found\n    assert candidate() == (True, 0), candidate()"
    assert trial(program, test, Limits()) == Outcome(True, "passed")


CALLS = """
    import ctypes, os, signal, socket, subprocess
    libc = ctypes.CDLL(None, use_errno=True)
    def refused(action):
        try:
            result = action()
        except OSError as error:
            return error.errno
        return ctypes.get_errno() if result == -1 else None
    def f():
        return {name: refused(action) for name, action in actions.items()}
    actions = ACTIONS
"""
EPERM, ENOENT, EINVAL, EROFS = 1, 2, 22, 30


def refusals(actions):
    """A program that tries actions, and returns for each the error number, or None where it succeeded."""
    return CALLS.replace("ACTIONS", actions)


def test_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "socket"))
        local.listen()
        port = server.getsockname()[1]
        program = refusals(
            f"""{{
                "tcp": lambda: socket.create_connection(("127.0.0.1", {port})),
                "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
                "unix": lambda: socket.socket(socket.AF_UNIX),
                "netlink": lambda: socket.socket(socket.AF_NETLINK),
                "pair": lambda: socket.socketpair(),
                "libc": lambda: libc.socket(2, 1, 0),
            }}"""
        )
        found(program, dict.fromkeys(("tcp", "udp", "unix", "netlink", "pair", "libc"), EPERM))


def test_no_power_over_others():
    program = refusals(
        """{
            "parent": lambda: os.kill(os.getppid(), signal.SIGKILL),
            "all": lambda: os.kill(-1, signal.SIGKILL),
            "group": lambda: os.kill(0, signal.SIGKILL),
            "pytest": lambda: os.kill(PYTEST, signal.SIGKILL),
            "root": lambda: os.setuid(0),
            "groups": lambda: os.setgroups([0]),
            "host name": lambda: socket.sethostname("x"),
            "namespaces": lambda: libc.unshare(0x10000000),
            "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
            "debugger": lambda: libc.ptrace(16, PYTEST, 0, 0),
            "exec": lambda: os.execv("/bin/sh", ["sh", "-c", "true"]),
            "shared memory": lambda: libc.shmget(0, 4096, 0o1600),
            "hidden file": lambda: os.memfd_create("x"),
            "cores": lambda: libc.prctl(4, 1, 0, 0, 0) if open("/proc/self/mem") else None,
            "spawn": lambda: subprocess.run(["true"]),
        }""".replace("PYTEST", str(os.getpid()))
    )
    expected = dict.fromkeys(
        ("parent", "all", "group", "pytest", "root", "groups", "host name", "namespaces", "mount", "debugger", "exec"),
        EPERM,
    )
    expected |= {"shared memory": EPERM, "hidden file": EPERM, "cores": ENOENT, "spawn": 11}
    if os.geteuid() != 0:
        expected["root"] = EINVAL  # a user that is not in the user namespace at all
    found(program, expected)


def test_no_files_of_others(tmp_path):
    """Not to be seen, not to be written; not even what all the world may write."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o777)
    victim.chmod(0o777)
    (victim / "file").write_text("years of work")
    (victim / "file").chmod(0o666)
    program = refusals(
        f"""{{
            "new": lambda: open("{victim}/new", "w"),
            "old": lambda: open("{victim}/file"),
            "delete": lambda: os.remove("{victim}/file"),
            "root": lambda: open("/new", "w"),
            "dev": lambda: open("/dev/new", "w"),
            "device": lambda: os.mknod("/tmp/disk", 0o60600, 0x800),
            "passwords": lambda: open("/etc/passwd"),
            "processes": lambda: os.listdir("/proc"),
            "shm": lambda: open("/dev/shm/new", "w"),
            "up": lambda: open("../../../../.." + "{victim}/file"),
        }}"""
    )
    refused = ("new", "old", "delete", "passwords", "processes", "shm", "up")
    found(program, {**dict.fromkeys(refused, ENOENT), "root": EROFS, "dev": EROFS, "device": EPERM})
    found("import os\ndef f(): return os.statvfs(os.__file__).f_flag & os.ST_RDONLY", os.ST_RDONLY)
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"file": "years of work"}


def test_working_folder_is_small():
    program = """
        import errno, os, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        def fill(path):
            with open(path, "wb", buffering=0) as file:
                written = 0
                try:
                    while True:
                        written += file.write(bytes(4096))
                except OSError as error:
                    return written, errno.errorcode[error.errno]
        def f():
            return os.getcwd(), os.listdir(), fill("a"), fill("b")
    """
    found(program, ("/tmp", [], (4 * 65_536, "EFBIG"), (0, "ENOSPC")), limits=Limits(file_bytes=4 * 65_536))


def test_kernel_confirms_the_fences():
    """Seen from outside: other namespaces, another user, no rights, the filter in place."""
    if os.geteuid() != 0:
        pytest.skip("the processes hide this from all but root")
    before = processes()
    program = "import time\ntime.sleep(60)"
    waiting = threading.Thread(target=trial, args=(program,), kwargs={"limits": Limits(wall_seconds=3)})
    waiting.start()

    def status(process):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return dict(line.replace("\t", " ").split(": ", 1) for line in lines if ": " in line.replace("\t", " "))

    def confined():
        with contextlib.suppress(OSError):
            return [p for p in processes() - before if status(p)["Seccomp"].strip() == "2"]
        return []

    assert wait_until(lambda: len(confined()) == 2)
    judge, program = sorted(confined(), key=lambda p: len(status(p)["NSpid"].split()))
    for name in ("mnt", "pid", "net", "ipc", "uts"):
        assert os.readlink(f"/proc/{program}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
    assert os.readlink(f"/proc/{program}/ns/pid") != os.readlink(f"/proc/{judge}/ns/pid")
    facts = status(program)
    assert facts["NSpid"].split()[-1] == facts["NSsid"].split()[-1] == "1"  # first process, of a session of its own
    assert facts["NoNewPrivs"].strip() == "1" and int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == 0
    assert len({0, int(facts["Uid"].split()[0]), int(status(judge)["Uid"].split()[0])}) == 3
    assert facts["Groups"].strip() == ""
    waiting.join()


def test_sandbox_dies_with_its_parent(tmp_path):
    before = processes()
    script = """
        from elastic_lightning.evaluation.sandbox import Limits, run_program
        limits = Limits(wall_seconds=60)
        run_program("import time\\ntime.sleep(60)", "def check(f): pass", "f", limits)
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=environment)
    assert wait_until(lambda: len(processes() - before) >= 4, 60)
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: processes() <= before)


# An ordinary user, in a mount namespace in which the interpreter can be read.
AS_ORDINARY_USER = """
    import os, sys
    from pathlib import Path
    from elastic_lightning.evaluation.jail import linux
    linux.call("unshare", linux.CLONE_NEWNS)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    prefix = Path(sys.base_prefix).resolve()
    closed = [path for path in reversed(prefix.parents) if not path.stat().st_mode & 1]
    if closed:
        inside = os.open(prefix, os.O_PATH)
        linux.mount("none", str(closed[0]), "tmpfs", 0, "mode=755")
        prefix.mkdir(parents=True)
        linux.mount(f"/proc/self/fd/{inside}", str(prefix), None, linux.MS_BIND | linux.MS_REC)
    os.setgroups([])
    os.setresgid(12345, 12345, 12345)
    os.setresuid(12345, 12345, 12345)
    os.chdir("/")
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""


def test_ordinary_user():
    if os.geteuid() != 0:
        pytest.skip("only root becomes another user; all other tests here are an ordinary user's anyway")
    fork = textwrap.dedent(FORK)
    script = f"""
        import os
        from elastic_lightning.evaluation.sandbox import Limits, missing_fences, run_program
        if missing_fences():
            raise SystemExit(missing_fences())
        def found(program, limits=Limits()):
            return run_program(program, "def check(f): raise Exception(f())", "f", limits).reason
        print(found("import os\\ndef f(): return os.getpid(), os.getuid(), os.listdir('/tmp')"))
        print(found({fork!r}))
        print(found({fork!r}, Limits(processes=3)))
        print(found("import os\\ndef f(): return os.kill(-1, 9)"))
        print(found("import socket\\ndef f(): socket.sethostname('x')"))  # needs rights
        print(found("import os\\ndef f(): return open('/proc/1/environ')"))
        print(run_program("def f(x): return x + 1", {ADD_ONE!r}, "f").reason)
    """
    command = [sys.executable, "-c", textwrap.dedent(AS_ORDINARY_USER), textwrap.dedent(script)]
    source = str(Path(sandbox.__file__).parents[2])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": source, "HOME": "/", "TMPDIR": "/tmp"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=source, env=environment)
    if "Permission denied" in run.stderr or "let a sandbox have files" in run.stderr:
        pytest.skip(f"an ordinary user can do too little here: {run.stderr.strip().splitlines()[-1]}")
    assert run.stdout.splitlines() == [
        "Exception: (1, 12345, [])",
        "Exception: [0, 11]",
        "Exception: [2, 11]",
        "PermissionError: [Errno 1] Operation not permitted",
        "PermissionError: [Errno 1] Operation not permitted",
        "FileNotFoundError: [Errno 2] No such file or directory: '/proc/1/environ'",
        "passed",
    ], run.stderr
