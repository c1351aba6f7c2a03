"""The Linux system calls that Python's `os` has not; the only owner of ctypes.

Each function is named after its man page and raises OSError with the call and its object in the message.
Nothing is decided here. Numbers are the same on every architecture since Linux 5.0; the older ones come
from a table.

Only the C half of ctypes is loaded, and every call goes through one function, syscall(2): the package
`ctypes` costs 2 of the 10 ms that a container's start spends on imports, and its conversions in Python
twice the time of the calls.
"""

from __future__ import annotations

import _ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001
    """A C long; what ctypes calls c_long."""

    _type_ = "l"


class _Word(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001
    """A machine word: takes an int, bytes (their address) or None; what ctypes calls c_void_p."""

    _type_ = "P"


class _Function(_ctypes.CFuncPtr):
    """A function of the C library that returns a long and keeps errno for us."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


class _Char(_ctypes._SimpleCData):  # type: ignore[type-arg]  # noqa: SLF001
    """A byte; what ctypes calls c_char."""

    _type_ = "c"


_syscall = _Function(_ctypes.dlsym(_ctypes.dlopen(None, os.RTLD_NOW), "syscall"))  # type: ignore[arg-type]
_syscall.argtypes = (_Long, *[_Word] * 6)
_get_errno = _ctypes.get_errno

MACHINE = os.uname().machine
_IOCTL, _FCNTL, _FLOCK, _CAPGET, _CAPSET, _PIVOT_ROOT = {
    "x86_64": (16, 72, 73, 125, 126, 155),
    "aarch64": (29, 25, 32, 90, 91, 41),
}.get(MACHINE, (-1,) * 6)
_PRCTL, _MOUNT, _UMOUNT2, _UNSHARE, _PRLIMIT, _SETNS = {
    "x86_64": (157, 165, 166, 272, 302, 308),
    "aarch64": (167, 40, 39, 97, 261, 268),
}.get(MACHINE, (-1,) * 6)
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 428, 429, 430, 431, 432
_PIDFD_SEND_SIGNAL, _PIDFD_OPEN, _CLOSE_RANGE, _OPENAT2, _MOUNT_SETATTR = 424, 434, 436, 437, 442

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_UNBINDABLE = (
    4096,
    16384,
    1 << 18,
    1 << 19,
    1 << 20,
    1 << 17,
)
MNT_DETACH = 2

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08
MOUNT_ATTR_ATIME = 0x70
MOUNT_ATTR_RELATIME = 0x00
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_SET_FD, _FSCONFIG_CMD_CREATE = 0, 1, 5, 6
FSCONFIG_STRING_MAX = 255
"""Longest string fsconfig(2) takes, in bytes."""
MOUNT_DATA_MAX = 4000
"""Longest option string given to mount(2): its page ends at 4096 bytes, and the kernel cuts what is longer
silently."""

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 8, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
_SECCOMP_MODE_FILTER = 2
_LOG_LINES = 8
_CAPABILITY_VERSION_3 = 0x20080522


def _fail(call: str, about: object = None) -> OSError:
    number = _get_errno()
    what = call if about is None else f"{call} {os.fsdecode(about) if isinstance(about, bytes) else about}"
    return OSError(number, f"{what}: {os.strerror(number)}")


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Call a system call by number; bytes travel as pointers."""
    return int(_syscall(number, *(*arguments, 0, 0, 0, 0, 0, 0)[:6]))


def _memory(content: bytes) -> Any:
    """Return a copy of `content` that has an address and can be written to; `raw` is what it holds."""
    kind = type("_Memory", (_ctypes.Array,), {"_type_": _Char, "_length_": len(content)})
    return kind.from_buffer_copy(content)  # type: ignore[attr-defined]


def _prctl(call: str, option: int, argument: int = 0, other: int | bytes = 0) -> None:
    if _call(_PRCTL, option, argument, other) != 0:
        raise _fail(f"prctl({call})")


def unshare(flags: int) -> None:
    """Leave the shared namespaces of `flags`.

    Source: unshare(2).
    """
    if _call(_UNSHARE, flags) != 0:
        raise _fail("unshare", hex(flags))


def setns(namespace_fd: int, flags: int) -> None:
    """Join a namespace by its file, or several of a process by its pidfd (Linux 5.8).

    Source: setns(2).
    """
    if _call(_SETNS, namespace_fd, flags) != 0:
        raise _fail("setns", hex(flags))


def pidfd_open(pid: int) -> int:
    """Return a close-on-exec descriptor of the process `pid` (Linux 5.3).

    Source: pidfd_open(2).
    """
    pidfd = _call(_PIDFD_OPEN, pid, 0)
    if pidfd < 0:
        raise _fail("pidfd_open", pid)
    return pidfd


def pidfd_send_signal(pidfd: int, number: int) -> None:
    """Send a signal to exactly the process behind `pidfd`.

    Source: pidfd_send_signal(2).
    """
    if _call(_PIDFD_SEND_SIGNAL, pidfd, number, None, 0) != 0:
        raise _fail("pidfd_send_signal", number)


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """Close every descriptor from `first` to `last` (Linux 5.9).

    Source: close_range(2).
    """
    if _call(_CLOSE_RANGE, first, last, 0) != 0:
        os.closerange(first, 65536)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mount the old way.

    Raises: OSError E2BIG for options that the kernel would cut. Source: mount(2).
    """
    encoded = os.fsencode(data)
    if len(encoded) > MOUNT_DATA_MAX:
        raise OSError(
            7, f"mount {target}: options of {len(encoded)} bytes, at most {MOUNT_DATA_MAX} are safe"
        )
    name = None if kind is None else kind.encode()
    if _call(_MOUNT, os.fsencode(source), os.fsencode(target), name, flags, encoded or None) != 0:
        raise _fail("mount", target)


def umount2(target: str, flags: int) -> None:
    """Unmount `target`. Source: umount(2)."""
    if _call(_UMOUNT2, os.fsencode(target), flags) != 0:
        raise _fail("umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root and hang the old one on `put_old`.

    Source: pivot_root(2).
    """
    if _call(_PIVOT_ROOT, os.fsencode(new_root), os.fsencode(put_old)) != 0:
        raise _fail("pivot_root", new_root)


def fsopen(kind: str) -> int:
    """Open a new, unconfigured filesystem of `kind` (Linux 5.2).

    Source: fsopen(2).
    """
    context_fd = _call(_FSOPEN, kind.encode(), 1)
    if context_fd < 0:
        raise _fail("fsopen", kind)
    return context_fd


def fsconfig_flag(context_fd: int, key: str) -> None:
    """Set an option that has no value. Source: fsconfig(2)."""
    if _call(_FSCONFIG, context_fd, _FSCONFIG_SET_FLAG, key.encode(), None, 0) != 0:
        raise _fail(f"fsconfig {key}", _context_log(context_fd))


def fsconfig_string(context_fd: int, key: str, value: str) -> None:
    """Set an option to a string of at most 255 bytes. Source: fsconfig(2)."""
    if _call(_FSCONFIG, context_fd, _FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0) != 0:
        raise _fail(f"fsconfig {key}={value}", _context_log(context_fd))


def fsconfig_fd(context_fd: int, key: str, value_fd: int) -> None:
    """Set an option to a descriptor. Source: fsconfig(2)."""
    if _call(_FSCONFIG, context_fd, _FSCONFIG_SET_FD, key.encode(), None, value_fd) != 0:
        raise _fail(f"fsconfig {key} fd", _context_log(context_fd))


def fsconfig_create(context_fd: int) -> None:
    """Create the configured filesystem. Source: fsconfig(2)."""
    if _call(_FSCONFIG, context_fd, _FSCONFIG_CMD_CREATE, None, None, 0) != 0:
        raise _fail("fsconfig create", _context_log(context_fd))


def _context_log(context_fd: int) -> str:
    """Return what the kernel says about the last failure; the number in errno is kept."""
    number = _get_errno()
    lines: list[str] = []
    while len(lines) < _LOG_LINES:
        try:
            lines.append(os.read(context_fd, 4096).decode(errors="replace").strip())
        except OSError:  # ENODATA: the log is read to its end
            break
    _ctypes.set_errno(number)
    return "; ".join(lines)


def fsmount(context_fd: int, attributes: int = 0) -> int:
    """Return a detached mount of a created filesystem.

    Source: fsmount(2).
    """
    mount_fd = _call(_FSMOUNT, context_fd, 1, attributes)
    if mount_fd < 0:
        raise _fail("fsmount", _context_log(context_fd))
    return mount_fd


def open_tree(directory_fd: int, path: str, flags: int) -> int:
    """Return a mount by descriptor, a detached copy with OPEN_TREE_CLONE.

    Source: open_tree(2).
    """
    tree_fd = _call(_OPEN_TREE, directory_fd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC)
    if tree_fd < 0:
        raise _fail("open_tree", path)
    return tree_fd


def move_mount(mount_fd: int, target_fd: int) -> None:
    """Attach the mount `mount_fd` on what `target_fd` is open on; no path is walked.

    Source: move_mount(2).
    """
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    if _call(_MOVE_MOUNT, mount_fd, b"", target_fd, b"", flags) != 0:
        raise _fail("move_mount")


def mount_setattr(
    directory_fd: int, path: str, *, flags: int = 0, add: int = 0, clear: int = 0, propagation: int = 0
) -> None:
    """Change a mount's attributes, with AT_RECURSIVE its children's too (Linux 5.12).

    Source: mount_setattr(2).
    """
    words = b"".join(value.to_bytes(8, "little") for value in (add, clear, propagation, 0))
    if _call(_MOUNT_SETATTR, directory_fd, os.fsencode(path), flags, words, len(words)) != 0:
        raise _fail("mount_setattr", path)


def openat2(directory_fd: int, path: str, *, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """Open `path` below `directory_fd` under the rules of `resolve` (Linux 5.6).

    Source: openat2(2).
    """
    how = b"".join(value.to_bytes(8, "little") for value in (flags | os.O_CLOEXEC, mode, resolve))
    opened_fd = _call(_OPENAT2, directory_fd, os.fsencode(path), how, len(how))
    if opened_fd < 0:
        raise _fail("openat2", path)
    return opened_fd


def flock(locked_fd: int, operation: int) -> None:
    """Lock or unlock an open file; the module `fcntl` would cost 0.2 ms of loading.

    Source: man 2 flock.
    """
    if _call(_FLOCK, locked_fd, operation) != 0:
        raise _fail("flock")


def ioctl(device_fd: int, request: int, argument: bytes) -> bytes:
    """Do what `request` says to a device, and return the argument as it is afterwards.

    Source: man 2 ioctl.
    """
    memory = _memory(argument)
    if _call(_IOCTL, device_fd, request, _ctypes.addressof(memory)) != 0:
        raise _fail("ioctl", hex(request))
    return bytes(memory.raw)


def seal(memory_fd: int) -> None:
    """Let nobody change a memory file any more, nor lift this. Source: fcntl(2) F_ADD_SEALS."""
    add_seals, everything = 1033, 0xF
    if _call(_FCNTL, memory_fd, add_seals, everything) != 0:
        raise _fail("fcntl(F_ADD_SEALS)")


def set_limits(resource: int, soft: int, hard: int) -> None:
    """Set a resource limit of this process; 2**64 - 1 is no limit. Source: prlimit(2)."""
    limits = soft.to_bytes(8, "little") + hard.to_bytes(8, "little")
    if _call(_PRLIMIT, 0, resource, limits, None) != 0:
        raise _fail("prlimit", resource)


def hard_limit(resource: int) -> int:
    """Return the hard limit of a resource of this process, 2**64 - 1 for none. Source: prlimit(2)."""
    limits = _memory(bytes(16))
    if _call(_PRLIMIT, 0, resource, None, _ctypes.addressof(limits)) != 0:
        raise _fail("prlimit", resource)
    return int.from_bytes(limits.raw[8:], "little")


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send us `number` when our parent ends; a change of credentials clears it."""
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, number)


def set_dumpable(value: int) -> None:
    """Hide (0) or show (1) this process's memory, descriptors and executable to others."""
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, value)


def set_child_subreaper() -> None:
    """Become the parent of orphaned descendants."""
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)


def set_no_new_privileges() -> None:
    """Refuse privileges from set-uid files from now on. Source: prctl(2)."""
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)


def keep_capabilities(value: int) -> None:
    """Keep (1) the permitted capabilities over the next change of user."""
    _prctl("PR_SET_KEEPCAPS", _PR_SET_KEEPCAPS, value)


def drop_bounding(capability: int) -> bool:
    """Drop a capability from the bounding set; False where this kernel has no such capability."""
    try:
        _prctl("PR_CAPBSET_DROP", _PR_CAPBSET_DROP, capability)
    except OSError as error:
        if error.errno == 22:  # noqa: PLR2004 - EINVAL: above the last capability
            return False
        raise
    return True


def clear_ambient() -> None:
    """Empty the ambient set."""
    _prctl("PR_CAP_AMBIENT_CLEAR_ALL", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def raise_ambient(capability: int) -> None:
    """Add a capability that is permitted and inheritable to the ambient set."""
    _prctl("PR_CAP_AMBIENT_RAISE", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


def capset(*, effective: int, permitted: int, inheritable: int) -> None:
    """Set this thread's capabilities; each set is a bit mask.

    Source: capset(2).
    """
    header = _CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    data = b"".join(
        (mask >> shift & 0xFFFFFFFF).to_bytes(4, "little")
        for shift in (0, 32)
        for mask in (effective, permitted, inheritable)
    )
    if _call(_CAPSET, header, data) != 0:
        raise _fail("capset", hex(permitted))


def permitted_capabilities() -> int:
    """Return this thread's permitted set as a bit mask. Source: capget(2)."""
    header = _CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    data = _memory(bytes(24))
    if _call(_CAPGET, header, _ctypes.addressof(data)) != 0:
        raise _fail("capget")
    return int.from_bytes(data.raw[4:8], "little") | int.from_bytes(data.raw[16:20], "little") << 32


def load_seccomp(program: bytes) -> None:
    """Install a cBPF filter of 8-byte instructions; it cannot be removed. Source: seccomp(2)."""
    code = _memory(program)
    header = (len(program) // 8).to_bytes(8, "little") + _ctypes.addressof(code).to_bytes(8, "little")
    _prctl("PR_SET_SECCOMP", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header)
