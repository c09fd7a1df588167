"""The fences round a program: namespaces, a root of its own, a user that is nobody else, and limits."""

from __future__ import annotations

import os
import resource
import stat
import sys
from typing import Any

from . import linux

HOME = "/tmp"  # the program's working folder where it has a root of its own
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
OPEN_FILES = 32
FILES = 256  # and folders, in the program's working folder
NAMESPACES = (
    linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
)  # files, processes, network, shared memory, host name


def spare_user() -> int | None:
    """A user id that nobody has, one above it too; None where this process may not change its user.

    Another for each process id, because the kernel counts the processes of a user over all sandboxes.
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as file:
        first, _, count = file.readlines()[-1].split()
    end = int(first) + int(count)
    if end < 2**16:
        raise OSError(1, f"this user namespace has only {end} users, and none to spare")
    return end - 1000 - 2 * (os.getpid() % 30_000)  # below nobody (65534, or the last id)


def enter_namespaces() -> None:
    """Files, processes (of children), network and shared memory of its own; a user namespace where root is not ours."""
    user, group = os.geteuid(), os.getegid()
    linux.call("unshare", NAMESPACES if user == 0 else NAMESPACES | linux.CLONE_NEWUSER)
    if user != 0:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)


def enter_own_root(place: str, owner: int, home_bytes: int) -> None:
    """Change to a root made at the folder `place`: python's library and the system's, read-only, and an empty HOME.

    Everything else is out of sight: other files, /proc, /sys and most of /dev. HOME lies in memory, holds at most
    `home_bytes`, belongs to `owner`, and is gone with the last process here.
    """
    linux.mount("none", place, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for path in _visible():
        _bind(path, place + path)
    os.mkdir(place + HOME)
    linux.make_read_only(place)
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    options = f"size={home_bytes},nr_inodes={FILES},mode=700,uid={owner}"
    linux.mount("none", place + HOME, "tmpfs", flags, options)
    linux.change_root(place)
    os.chdir(HOME)


def overfull(folder: str, most_bytes: int) -> bool:
    """Whether a working folder that is no file system of its own holds more than such a one might, or what cannot be
    looked at, as a path too long."""
    held, count, folders = 0, 0, [folder]
    while folders:
        try:
            for entry in os.scandir(folders.pop()):
                facts = entry.stat(follow_symlinks=False)
                held, count = held + stat.S_ISREG(facts.st_mode) * facts.st_size, count + 1
                if held > most_bytes or count > FILES:
                    return True
                if stat.S_ISDIR(facts.st_mode):
                    folders.append(entry.path)
        except FileNotFoundError:  # it was there a moment ago
            continue
        except OSError:
            return True
    return False


def confine(user: int | None, limits: dict[str, Any], processes: int, writable: str | None = None) -> None:
    """Take from this process, and all it starts, what a program needs not: limits, user, capabilities, system calls.

    Where it has no root of its own, the one folder that it may write in is `writable`.
    """
    for name, value in (
        ("CPU", limits["cpu_seconds"]),
        ("AS", limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"]),
        ("NPROC", processes),
        ("NOFILE", OPEN_FILES),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(kind)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(kind, (value, value))
    if writable is not None:
        try:
            linux.write_only_in(writable, os.devnull)
        except OSError as error:
            raise OSError(
                error.errno, f"without namespaces, files need Landlock (Linux 5.13): {error.strerror}"
            ) from None
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    linux.drop_capabilities()
    linux.call("prctl", linux.PR_SET_DUMPABLE, 0, 0, 0, 0)  # no debugger, even of the same user
    linux.call("prctl", linux.PR_SET_PDEATHSIG, 9, 0, 0, 0)  # a change of user clears it
    linux.forbid_calls()


def _visible() -> list[str]:
    """Paths that python needs, none below another."""
    library = [path for path in sys.path if os.path.exists(path)]
    around = [os.path.dirname(os.path.dirname(os.__file__))]  # where libpython lies, and what conda links with
    paths = sorted({*library, *around, *(path for path in LIBRARIES + DEVICES if os.path.exists(path))})
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]


def _bind(path: str, target: str) -> None:
    """Show the file or folder `path`, or what it links to, at `target`."""
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _write(target, "")
    linux.mount(path, target, None, linux.MS_BIND | linux.MS_REC)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
