"""The kernel's calls that python does not offer, and the filter that forbids system calls."""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_ANY_NAMESPACE = 0x7E020080
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, AT_RECURSIVE = 2, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

# Of linux/bpf_common.h and linux/seccomp.h.
LOAD_WORD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
OFFSET_NUMBER, OFFSET_ARCH, OFFSET_FIRST_ARGUMENT = 0, 4, 16
KILL, ALLOW, ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
EPERM, ENOSYS = 1, 38
X32 = 0x40000000

# The machines whose call numbers are known: audit architecture, then the numbers (unistd.h) that both name differently.
MACHINES = {
    "x86_64": {
        "arch": 0xC000003E, "clone": 56, "socket": 41, "socketpair": 53, "kill": 62, "tkill": 200, "tgkill": 234,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
        "chroot": 161, "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250,
        "execve": 59, "execveat": 322,
    },
    "aarch64": {
        "arch": 0xC00000B7, "clone": 220, "socket": 198, "socketpair": 199, "kill": 129, "tkill": 130, "tgkill": 131,
        "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "chroot": 51, "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "memfd_create": 279, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "add_key": 217, "request_key": 218, "keyctl": 219,
        "execve": 221, "execveat": 281,
    },
}  # fmt: skip
CLONE3, MOUNT_SETATTR = 435, 442  # from 424 on, numbers are the same everywhere
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
# Of linux/landlock.h: write and truncate a file; make or remove anything in a folder, also by a link or a move.
LANDLOCK_WRITE, LANDLOCK_TRUNCATE, LANDLOCK_IN_FOLDERS = 1 << 1, 1 << 14, 0b11_1111_1111 << 4
TRUNCATE_KNOWN = 3  # the version from which on the kernel can forbid truncation
FORBIDDEN_EVERYWHERE = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434, "pidfd_getfd": 438,
    "mount_setattr": MOUNT_SETATTR, "memfd_secret": 447,
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | ctypes.Array) -> int:
    """One function of the C library; raises the `OSError` it reports. Integers are passed as longs."""
    longs = (ctypes.c_long(value) if isinstance(value, int) else value for value in arguments)
    result = getattr(_libc, name)(*longs)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    call("mount", source.encode(), target.encode(), kind and kind.encode(), flags, options and options.encode())


def make_read_only(path: str) -> None:
    """Remount everything below `path` read-only and without set-uid programs (Linux 5.12)."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, -100, path.encode(), AT_RECURSIVE, attributes, len(attributes))


def change_root(path: str) -> None:
    """Make the mount at `path` the root of this mount namespace, and let go of the old one."""
    os.chdir(path)
    call("syscall", machine()["pivot_root"], b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def write_only_in(folder: str, *files: str) -> None:
    """Let this process, and all it starts, write to these files and below the folder, and nowhere else, for good."""
    version = call("syscall", LANDLOCK_CREATE, 0, 0, 1)
    writing = LANDLOCK_WRITE | (LANDLOCK_TRUNCATE if version >= TRUNCATE_KNOWN else 0)
    rights = writing | LANDLOCK_IN_FOLDERS & ~(0 if version > 1 else 1 << 13)
    rules = call("syscall", LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0)
    for path, allowed in ((folder, rights), *((file, writing) for file in files)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        call("syscall", LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("syscall", LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def drop_capabilities() -> None:
    """Give up every capability in this user namespace."""
    call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), struct.pack("6I", *[0] * 6))


def machine() -> dict[str, int]:
    """The call numbers of this machine."""
    name = os.uname().machine
    if name not in MACHINES or struct.calcsize("P") != 8:
        raise OSError(ENOSYS, f"system calls are known for 64-bit {' and '.join(MACHINES)}, not for {name}")
    return MACHINES[name]


def forbid_calls() -> None:
    """Deny sockets, other programs, signals, new namespaces and mounts, debugging, and memory that no limit counts.

    For this process and all it starts, for good; denied calls fail with EPERM. clone3 hides its flags behind a
    pointer, so it is said not to exist, and the C library falls back to clone.
    """
    numbers = dict(machine())
    arch, clone = numbers.pop("arch"), numbers.pop("clone")
    denied = sorted([*numbers.values(), *FORBIDDEN_EVERYWHERE.values()])
    program = [
        (LOAD_WORD, 0, 0, OFFSET_ARCH),
        (JUMP_EQUAL, 1, 0, arch),
        (RETURN, 0, 0, KILL),
        (LOAD_WORD, 0, 0, OFFSET_NUMBER),
        (JUMP_GREATER_EQUAL, 0, 1, X32),  # x86-64's other set of numbers
        (RETURN, 0, 0, ERRNO | EPERM),
    ]
    for number in denied:
        program += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | EPERM)]
    program += [
        (JUMP_EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ERRNO | ENOSYS),
        (JUMP_EQUAL, 0, 3, clone),
        (LOAD_WORD, 0, 0, OFFSET_FIRST_ARGUMENT),
        (JUMP_SET, 0, 1, CLONE_ANY_NAMESPACE),
        (RETURN, 0, 0, ERRNO | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
