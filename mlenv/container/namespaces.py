"""Which namespaces a container gets, and how its users map to the host's.

Source: OCI runtime-spec 1.0.2 config-linux.md "Namespaces"; user_namespaces(7); newuidmap(1); subuid(5).
"""

from __future__ import annotations

import os

from mlenv.container import syscalls
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Triples = list[tuple[int, int, int]]

FLAGS = {
    "user": syscalls.CLONE_NEWUSER,
    "pid": syscalls.CLONE_NEWPID,
    "network": syscalls.CLONE_NEWNET,
    "mount": syscalls.CLONE_NEWNS,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}
FILES = {"network": "net", "mount": "mnt"}
"""Names under /proc/PID/ns where they differ from OCI's."""
_RANGE_MIN = 1000
"""A subordinate range smaller than this holds too few of an image's users to be worth mapping."""


class IdMap:
    """How container ids map to host ids: triples of (container id, host id, length).

    `mode` is `root` (no user namespace), `ranges` (newuidmap), `explicit` (the bundle's own) or `single`
    (the invoking user alone); `reason` says why it is no more than single.
    """

    __slots__ = ("gids", "mode", "reason", "uids")

    def __init__(self, mode: str, uids: Triples, gids: Triples, reason: str | None = None) -> None:
        self.mode = mode
        self.uids = uids
        self.gids = gids
        self.reason = reason

    @property
    def needs_namespace(self) -> bool:
        """Whether the container has a user namespace."""
        return self.mode != "root"

    @property
    def gid_count(self) -> int:
        """Return the first gid from 0 on that does not exist in the container."""
        return (
            2**32 - 1
            if self.mode == "root"
            else next((end for start, _, end in self.gids if not start), 0) or 1
        )


def plan(bundle_linux: Mapping[str, Any]) -> IdMap:
    """Return the map of a container started by this process's user."""
    uid, gid = os.geteuid(), os.getegid()
    wants_user = any(entry["type"] == "user" for entry in bundle_linux.get("namespaces", ()))
    if uid == 0:
        return _root_plan(bundle_linux) if wants_user else IdMap("root", [], [])
    uids, reason = _subordinate("/etc/subuid", uid)
    gids, other = _subordinate("/etc/subgid", uid)
    reason = reason or other or _missing_helper()
    if reason:
        return single(uid, gid, reason)
    return IdMap("ranges", [(0, uid, 1), *uids], [(0, gid, 1), *gids])


def _root_plan(bundle_linux: Mapping[str, Any]) -> IdMap:
    maps = [
        [(entry["containerID"], entry["hostID"], entry["size"]) for entry in bundle_linux.get(key, ())]
        for key in ("uidMappings", "gidMappings")
    ]
    if not maps[0] or not maps[1]:
        raise ContainerError("a user namespace made by root needs linux.uidMappings and linux.gidMappings")
    return IdMap("explicit", maps[0], maps[1])


def single(uid: int, gid: int, reason: str) -> IdMap:
    """Return the map that needs no helper: container root is the invoking user and nobody else exists."""
    return IdMap("single", [(0, uid, 1)], [(0, gid, 1)], reason)


def _subordinate(file: str, uid: int) -> tuple[Triples, str | None]:
    """Return this user's subordinate ids as triples from container id 1 on, or why there are none."""
    import pwd

    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    triples: Triples = []
    next_id = 1
    try:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                owner, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if owner in (name, str(uid)) and first.isdigit() and count.isdigit():
                    triples.append((next_id, int(first), int(count)))
                    next_id += int(count)
    except OSError as error:
        return [], f"{file} cannot be read: {error.strerror}"
    if next_id - 1 < _RANGE_MIN:
        return [], f"{file} gives {name} fewer than {_RANGE_MIN} ids"
    return triples, None


def _missing_helper() -> str | None:
    for helper in ("newuidmap", "newgidmap"):
        if find_program(helper) is None:
            return f"{helper} is not installed (package uidmap)"
    return None


def find_program(name: str) -> str | None:
    """Return the host's program `name`, or None; the system's own directories are searched after PATH."""
    directories = os.environ.get("PATH", "").split(":")
    for directory in (*directories, "/usr/local/bin", "/usr/bin", "/usr/sbin", "/sbin"):
        path = f"{directory}/{name}"
        if directory.startswith("/") and os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


def write_map(id_map: IdMap, pid: int) -> IdMap:
    """Write the map of the user namespace that `pid` has just made; return the one that is in force.

    Where newuidmap refuses, the single-user map takes its place, with newuidmap's words as the reason.
    """
    if id_map.mode == "explicit":
        for kind, triples in (("uid_map", id_map.uids), ("gid_map", id_map.gids)):
            _write_proc(pid, kind, "\n".join(" ".join(map(str, triple)) for triple in triples))
        return id_map
    if id_map.mode == "ranges":
        reason = _run_helpers(id_map, pid)
        if reason is None:
            return id_map
        id_map = single(os.geteuid(), os.getegid(), reason)
    try:
        _write_proc(pid, "uid_map", " ".join(map(str, id_map.uids[0])))
        _write_proc(pid, "setgroups", "deny")
        _write_proc(pid, "gid_map", " ".join(map(str, id_map.gids[0])))
    except PermissionError:
        if id_map.reason and "newuidmap" in id_map.reason:  # it wrote one map of the two: nothing else can
            raise ContainerError("cannot map the container's users", cause=id_map.reason) from None
        raise
    return id_map


def _write_proc(pid: int, name: str, content: str) -> None:
    file_fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file_fd, content.encode())
    finally:
        os.close(file_fd)


def _run_helpers(id_map: IdMap, pid: int) -> str | None:
    """Run newuidmap and newgidmap beside each other; return why they failed, or None."""
    read_fd, write_fd = os.pipe()
    started = []
    try:
        for helper, triples in (("newuidmap", id_map.uids), ("newgidmap", id_map.gids)):
            path = find_program(helper) or helper
            words = [helper, str(pid), *(str(number) for triple in triples for number in triple)]
            actions = [(os.POSIX_SPAWN_DUP2, write_fd, 2)]
            started.append(os.posix_spawn(path, words, {"PATH": "/usr/bin:/bin"}, file_actions=actions))
    finally:
        os.close(write_fd)
    statuses = [os.waitpid(child, 0)[1] for child in started]
    complaint = os.read(read_fd, 4096).decode(errors="replace").strip()
    os.close(read_fd)
    return (complaint or "newuidmap failed") if any(statuses) else None


def flags(kinds: Sequence[str]) -> int:
    """Return the namespaces as bits of unshare(2)."""
    bits = 0
    for kind in kinds:
        bits |= FLAGS[kind]
    return bits


def join(kind: str, path: str) -> None:
    """Join the namespace at `path`, whatever the rest of the container does."""
    namespace_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(namespace_fd, FLAGS[kind])
    finally:
        os.close(namespace_fd)


def bring_loopback_up() -> None:
    """Switch `lo` on in this network namespace. Source: netdevice(7)."""
    import _socket

    get_flags, set_flags, up = 0x8913, 0x8914, 1
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        request = syscalls.ioctl(control.fileno(), get_flags, b"lo".ljust(40, b"\0"))
        value = int.from_bytes(request[16:18], "little") | up
        syscalls.ioctl(control.fileno(), set_flags, request[:16] + value.to_bytes(2, "little") + request[18:])
    finally:
        control.close()
