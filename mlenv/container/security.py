"""What a container's process may do: user, capabilities, limits, and the system call filter, in this order.

Source: capabilities(7); OCI runtime-spec 1.0.2 config.md "Linux Process".
"""

from __future__ import annotations

import os

from mlenv.container import syscalls
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

CAPABILITY_NUMBERS = {
    f"CAP_{name}": number
    for number, name in enumerate(
        [
            "CHOWN",
            "DAC_OVERRIDE",
            "DAC_READ_SEARCH",
            "FOWNER",
            "FSETID",
            "KILL",
            "SETGID",
            "SETUID",
            "SETPCAP",
            "LINUX_IMMUTABLE",
            "NET_BIND_SERVICE",
            "NET_BROADCAST",
            "NET_ADMIN",
            "NET_RAW",
            "IPC_LOCK",
            "IPC_OWNER",
            "SYS_MODULE",
            "SYS_RAWIO",
            "SYS_CHROOT",
            "SYS_PTRACE",
            "SYS_PACCT",
            "SYS_ADMIN",
            "SYS_BOOT",
            "SYS_NICE",
            "SYS_RESOURCE",
            "SYS_TIME",
            "SYS_TTY_CONFIG",
            "MKNOD",
            "LEASE",
            "AUDIT_WRITE",
            "AUDIT_CONTROL",
            "SETFCAP",
            "MAC_OVERRIDE",
            "MAC_ADMIN",
            "SYSLOG",
            "WAKE_ALARM",
            "BLOCK_SUSPEND",
            "AUDIT_READ",
            "PERFMON",
            "BPF",
            "CHECKPOINT_RESTORE",
        ]
    )
}
"""Source: include/uapi/linux/capability.h, Linux 6.17."""
LIMIT_NUMBERS = {
    f"RLIMIT_{name}": number
    for number, name in enumerate(
        [
            "CPU",
            "FSIZE",
            "DATA",
            "STACK",
            "CORE",
            "RSS",
            "NPROC",
            "NOFILE",
            "MEMLOCK",
            "AS",
            "LOCKS",
            "SIGPENDING",
            "MSGQUEUE",
            "NICE",
            "RTPRIO",
            "RTTIME",
        ]
    )
}
"""Source: include/uapi/asm-generic/resource.h, Linux 6.17."""
_UNLIMITED = 2**64 - 1


class Identity:
    """Who a process is inside: the container's numbers, and the home directory its passwd file names."""

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: Sequence[int] = (), home: str | None = None) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = list(groups)
        self.home = home


class Privileges:
    """Everything of `process` that is decided before the fork and applied after it."""

    __slots__ = ("ambient", "bounding", "effective", "filter", "inheritable", "limits", "no_new", "permitted")

    def __init__(self, process: Mapping[str, Any], system_call_filter: bytes | None) -> None:
        wanted = process.get("capabilities", {})
        self.bounding = mask(wanted.get("bounding", ()))
        self.effective = mask(wanted.get("effective", ()))
        self.permitted = mask(wanted.get("permitted", ()))
        self.inheritable = mask(wanted.get("inheritable", ()))
        self.ambient = mask(wanted.get("ambient", ()))
        self.limits = [limit(entry) for entry in process.get("rlimits", ())]
        self.no_new = bool(process.get("noNewPrivileges"))
        self.filter = system_call_filter


def mask(names: Sequence[str]) -> int:
    """Return capability names as bits. Raises: ContainerError for one that does not exist."""
    bits = 0
    for name in names:
        if name not in CAPABILITY_NUMBERS:
            raise ContainerError(f"no capability is called `{name}`")
        bits |= 1 << CAPABILITY_NUMBERS[name]
    return bits


def limit(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (resource, soft, hard) of an OCI rlimit. Raises: ContainerError for an unknown one."""
    if entry["type"] not in LIMIT_NUMBERS:
        raise ContainerError(f"no resource limit is called `{entry['type']}`")
    return LIMIT_NUMBERS[entry["type"]], _amount(entry["soft"]), _amount(entry["hard"])


def _amount(wanted: int) -> int:
    return min(wanted, _UNLIMITED) if wanted >= 0 else _UNLIMITED


def apply_limits(limits: Sequence[tuple[int, int, int]]) -> None:
    """Set the limits, each at most at the hard limit that is in force where it cannot be raised.

    A container that asks for a million files on a machine that allows 20000 runs with 20000.
    """
    for number, soft, hard in limits:
        try:
            syscalls.set_limits(number, soft, hard)
        except OSError:
            allowed = syscalls.hard_limit(number)
            syscalls.set_limits(number, min(soft, allowed), min(hard, allowed))


def become(identity: Identity, privileges: Privileges, *, can_set_groups: bool, umask: int | None) -> None:
    """Give up everything the process shall not have; the filter comes last because it forbids the rest.

    Raises: OSError naming the call.
    """
    apply_limits(privileges.limits)
    held = syscalls.permitted_capabilities()
    for number in range(64):
        if not privileges.bounding >> number & 1 and not syscalls.drop_bounding(number):
            break
    syscalls.clear_ambient()
    if can_set_groups:
        os.setgroups(identity.groups)
    syscalls.keep_capabilities(1)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    syscalls.keep_capabilities(0)
    if umask is not None:
        os.umask(umask)
    if privileges.no_new:
        syscalls.set_no_new_privileges()
        _set_capabilities(privileges, held)
        _filter(privileges)
    else:  # without no_new_privs loading a filter needs CAP_SYS_ADMIN: it goes first
        _filter(privileges)
        _set_capabilities(privileges, held)


def _set_capabilities(privileges: Privileges, held: int) -> None:
    syscalls.capset(
        effective=privileges.effective & held,
        permitted=privileges.permitted & held,
        inheritable=privileges.inheritable & held,
    )
    for number in range(64):
        if privileges.ambient >> number & 1:
            syscalls.raise_ambient(number)


def _filter(privileges: Privileges) -> None:
    if privileges.filter is not None:
        syscalls.load_seccomp(privileges.filter)


def look_up(text: str, passwd: bytes, group: bytes) -> Identity:
    """Return who `NAME|UID[:GROUP|GID]` is by the container's own files.

    Raises: ContainerError for a name they do not have. Source: passwd(5), group(5).
    """
    wanted, _, wanted_group = text.partition(":")
    entry = _entry(passwd, wanted, 7)
    if entry is None and not wanted.isdigit():
        raise ContainerError(
            f"the container has no user `{wanted}`", hint="give a number, or a name of /etc/passwd"
        )
    uid = int(entry[2]) if entry else int(wanted)
    gid = int(entry[3]) if entry else 0
    home = entry[5] if entry else None
    if wanted_group:
        named = _entry(group, wanted_group, 4)
        if named is None and not wanted_group.isdigit():
            raise ContainerError(f"the container has no group `{wanted_group}`")
        return Identity(uid, int(named[2]) if named else int(wanted_group), (), home)
    groups = [int(row[2]) for row in _rows(group, 4) if entry and entry[0] in row[3].split(",")]
    return Identity(uid, gid, groups, home)


def _rows(content: bytes, columns: int) -> list[list[str]]:
    rows = [line.split(":") for line in content.decode(errors="replace").splitlines()]
    return [row for row in rows if len(row) >= columns and row[2].isdigit()]


def _entry(content: bytes, key: str, columns: int) -> list[str] | None:
    for row in _rows(content, columns):
        if key in (row[0], row[2]):
            return row
    return None
