"""The nodes of /dev: made with mknod by root, shown from the host in a user namespace.

Source: OCI runtime-spec 1.0.2 config-linux.md "Devices" and "Default Devices"; runtime-linux.md "Dev
symbolic links".
"""

from __future__ import annotations

import os
import stat

from mlenv.container import mounts, syscalls
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

DEFAULT_NODES = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
)
"""Name, major and minor of what every container has, mode 0666."""
LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)
_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_BIND_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NOEXEC


def populate(root_fd: int, requested: Sequence[Mapping[str, Any]], *, make_nodes: bool) -> None:
    """Fill the container's /dev; `make_nodes` says whether mknod is allowed here."""
    dev_fd = mounts.make_target(root_fd, "/dev", directory=True)
    try:
        for name, major, minor in DEFAULT_NODES:
            if make_nodes:
                _make_node(dev_fd, name, stat.S_IFCHR, 0o666, os.makedev(major, minor))
            else:
                _bind_node(root_fd, f"/dev/{name}", os.makedev(major, minor), stat.S_IFCHR)
        for name, target in LINKS:
            _link(dev_fd, name, target)
    finally:
        os.close(dev_fd)
    for device in requested:
        add(root_fd, device, make_nodes=make_nodes)


def _make_node(parent_fd: int, name: str, kind: int, mode: int, number: int) -> None:
    try:
        os.mknod(name, kind | mode, number, dir_fd=parent_fd)
    except FileExistsError:
        found = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        if stat.S_IFMT(found.st_mode) != kind or found.st_rdev != number:
            raise
        return
    os.chmod(name, mode, dir_fd=parent_fd)


def _bind_node(root_fd: int, path: str, number: int, kind: int) -> None:
    """Show the host's node of the same name, after a look at what it really is."""
    tree_fd = mounts.bind_tree(path, recursive=False, add=_BIND_ATTRIBUTES)
    found = os.fstat(tree_fd)
    if stat.S_IFMT(found.st_mode) != kind or found.st_rdev != number:
        os.close(tree_fd)
        raise ContainerError(
            f"the host's `{path}` is not the device {os.major(number)}:{os.minor(number)}",
            cause=f"it is {found.st_mode:o} {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}",
        )
    mounts.attach(tree_fd, root_fd, path, directory=False)


def _link(dev_fd: int, name: str, target: str) -> None:
    try:
        os.symlink(target, name, dir_fd=dev_fd)
    except FileExistsError:  # the image's /dev has its own
        return


def add(root_fd: int, device: Mapping[str, Any], *, make_nodes: bool) -> None:
    """Add one OCI device. Raises: ContainerError for an unknown type or a host node that is another."""
    kind = _TYPES.get(device["type"])
    if kind is None:
        raise ContainerError(f"cannot make `{device['path']}`: device type `{device['type']}` is not known")
    number = os.makedev(device.get("major", 0), device.get("minor", 0))
    if not make_nodes:
        _bind_node(root_fd, device["path"], number, kind)
        return
    parent, _, name = device["path"].rpartition("/")
    parent_fd = mounts.make_target(root_fd, parent or "/", directory=True)
    try:
        _make_node(parent_fd, name, kind, device.get("fileMode", 0o666), number)
        if device.get("uid") or device.get("gid"):
            os.chown(
                name, device.get("uid", 0), device.get("gid", 0), dir_fd=parent_fd, follow_symlinks=False
            )
    finally:
        os.close(parent_fd)


def add_console(root_fd: int, terminal: str) -> None:
    """Show the pty `terminal` (a path in the container) as /dev/console."""
    source_fd = mounts.open_in_root(root_fd, terminal)
    try:
        tree_fd = syscalls.open_tree(source_fd, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
    finally:
        os.close(source_fd)
    mounts.attach(tree_fd, root_fd, "/dev/console", directory=False)
