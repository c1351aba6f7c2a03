"""Mounts as values: read from the configuration first, applied by descriptor later.

Every path inside the root is resolved by the kernel with the root as its `/` (openat2 RESOLVE_IN_ROOT),
so a link in an image can lead nowhere else; no path is joined and mounted by name.

Source: OCI runtime-spec 1.0.2 config.md "Mounts"; mount_setattr(2); fsopen(2).
"""

from __future__ import annotations

import os
import stat

from mlenv.container import syscalls
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_ATTRIBUTES = {
    "ro": (syscalls.MOUNT_ATTR_RDONLY, 0),
    "rw": (0, syscalls.MOUNT_ATTR_RDONLY),
    "nosuid": (syscalls.MOUNT_ATTR_NOSUID, 0),
    "suid": (0, syscalls.MOUNT_ATTR_NOSUID),
    "nodev": (syscalls.MOUNT_ATTR_NODEV, 0),
    "dev": (0, syscalls.MOUNT_ATTR_NODEV),
    "noexec": (syscalls.MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, syscalls.MOUNT_ATTR_NOEXEC),
    "noatime": (syscalls.MOUNT_ATTR_NOATIME, syscalls.MOUNT_ATTR_ATIME),
    "strictatime": (syscalls.MOUNT_ATTR_STRICTATIME, syscalls.MOUNT_ATTR_ATIME),
    "relatime": (syscalls.MOUNT_ATTR_RELATIME, syscalls.MOUNT_ATTR_ATIME),
    "nodiratime": (syscalls.MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, syscalls.MOUNT_ATTR_NODIRATIME),
    "nosymfollow": (syscalls.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, syscalls.MOUNT_ATTR_NOSYMFOLLOW),
}
"""Per option: the attributes it sets and those it clears."""
_PROPAGATION = {
    "private": syscalls.MS_PRIVATE,
    "slave": syscalls.MS_SLAVE,
    "shared": syscalls.MS_SHARED,
    "unbindable": syscalls.MS_UNBINDABLE,
}
_KINDS = ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "overlay", "bind", "none", "")
_EXISTING = os.O_PATH
_IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS


class Mount:
    """One mount: what, where, and with which attributes.

    `add` and `clear` are attributes of the mount itself, `add_all` and `clear_all` of it and all below;
    `data` are the filesystem's own options, a value of None is a flag.
    """

    __slots__ = (
        "add",
        "add_all",
        "clear",
        "clear_all",
        "data",
        "kind",
        "propagation",
        "recursive",
        "source",
        "target",
    )

    def __init__(self, *, kind: str, source: str, target: str) -> None:
        self.kind = kind
        self.source = source
        self.target = target
        self.recursive = False
        self.add = self.clear = self.add_all = self.clear_all = self.propagation = 0
        self.data: list[tuple[str, str | None]] = []

    def __repr__(self) -> str:
        """Return the mount as `-vv` prints it."""
        return (
            f"Mount({self.kind} {self.source} -> {self.target} +{self.add:#x} -{self.clear:#x} {self.data})"
        )

    @property
    def is_bind(self) -> bool:
        """Whether this shows an existing tree again."""
        return self.kind == "bind"

    def apply(self, root_fd: int) -> None:
        """Attach the mount below `root_fd`, in this process's mount namespace.

        Raises: OSError naming the call.
        """
        tree_fd = self._source_tree() if self.is_bind else self.new_filesystem()
        try:
            is_directory = stat.S_ISDIR(os.fstat(tree_fd).st_mode)
            target_fd = make_target(root_fd, self.target, directory=is_directory)
            try:
                syscalls.move_mount(tree_fd, target_fd)
            finally:
                os.close(target_fd)
            self._set_propagation(tree_fd)
        finally:
            os.close(tree_fd)

    def _source_tree(self) -> int:
        flags = syscalls.OPEN_TREE_CLONE | (syscalls.AT_RECURSIVE if self.recursive else 0)
        tree_fd = syscalls.open_tree(syscalls.AT_FDCWD, self.source, flags)
        _set_attributes(tree_fd, 0, self.add, self.clear)
        _set_attributes(tree_fd, syscalls.AT_RECURSIVE, self.add_all, self.clear_all)
        return tree_fd

    def new_filesystem(self) -> int:
        """Return the filesystem as a detached mount."""
        context_fd = syscalls.fsopen(self.kind)
        try:
            if self.source and self.kind != "mqueue":
                syscalls.fsconfig_string(context_fd, "source", self.source)
            for key, value in self.data:
                if value is None:
                    syscalls.fsconfig_flag(context_fd, key)
                else:
                    syscalls.fsconfig_string(context_fd, key, value)
            syscalls.fsconfig_create(context_fd)
            return syscalls.fsmount(context_fd, self.add | self.add_all)
        finally:
            os.close(context_fd)

    def _set_propagation(self, tree_fd: int) -> None:
        if self.propagation:
            flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if self.recursive else 0)
            syscalls.mount_setattr(tree_fd, "", flags=flags, propagation=self.propagation)


def _set_attributes(tree_fd: int, flags: int, add: int, clear: int) -> None:
    if add or clear:
        syscalls.mount_setattr(tree_fd, "", flags=flags | syscalls.AT_EMPTY_PATH, add=add, clear=clear)


def read_mounts(entries: Sequence[Mapping[str, Any]], bundle_path: str) -> list[Mount]:
    """Return the configuration's mounts in order.

    Raises: ContainerError naming an option or a type that is not carried out.
    """
    return [_read_mount(entry, bundle_path) for entry in entries]


def _read_mount(entry: Mapping[str, Any], bundle_path: str) -> Mount:
    options = entry.get("options", [])
    kind = entry.get("type", "")
    binds = kind in ("bind", "rbind") or "bind" in options or "rbind" in options
    if not binds and kind not in _KINDS:
        raise ContainerError(f"cannot mount `{kind}` on `{entry['destination']}`: this type is not supported")
    source = entry.get("source", "")
    if binds:
        source = os.path.join(bundle_path, source)
    mount = Mount(kind="bind" if binds else kind, source=source, target=entry["destination"])
    mount.recursive = "rbind" in options or kind == "rbind"
    for option in options:
        if option not in ("bind", "rbind", "defaults"):
            _read_option(mount, option)
    return mount


def _read_option(mount: Mount, option: str) -> None:
    if option in _ATTRIBUTES:
        add, clear = _ATTRIBUTES[option]
        mount.add = mount.add & ~clear | add
        # A bind keeps what its source has: in a user namespace the kernel locks those attributes anyway.
        mount.clear = mount.clear & ~add | (clear & syscalls.MOUNT_ATTR_ATIME if mount.is_bind else clear)
    elif option[:1] == "r" and option[1:] in _ATTRIBUTES:
        add, clear = _ATTRIBUTES[option[1:]]
        mount.add_all = mount.add_all & ~clear | add
        mount.clear_all = mount.clear_all & ~add | clear
    elif option in _PROPAGATION:
        mount.propagation = _PROPAGATION[option]
    elif option[:1] == "r" and option[1:] in _PROPAGATION:
        mount.propagation, mount.recursive = _PROPAGATION[option[1:]], mount.recursive
    elif mount.is_bind:
        raise ContainerError(f"cannot bind `{mount.target}`: the option `{option}` is not supported")
    else:
        key, equals, value = option.partition("=")
        mount.data.append((key, value if equals else None))


def open_in_root(root_fd: int, path: str, flags: int = _EXISTING) -> int:
    """Open `path` as a process whose root is `root_fd` would; magic links are refused."""
    return syscalls.openat2(root_fd, path.lstrip("/") or ".", flags=flags, resolve=_IN_ROOT)


def make_target(root_fd: int, path: str, *, directory: bool) -> int:
    """Return `path` in the root opened with O_PATH, made as an empty directory or file where it is missing.

    Raises: OSError ENOTDIR or EISDIR where something of the other kind is there.
    """
    try:
        return open_in_root(root_fd, path, _EXISTING | (os.O_DIRECTORY if directory else 0))
    except FileNotFoundError:
        pass
    parent, _, name = path.rstrip("/").rpartition("/")
    parent_fd = make_target(root_fd, parent or "/", directory=True)
    try:
        _create(parent_fd, name, directory=directory)
    finally:
        os.close(parent_fd)
    return open_in_root(root_fd, path, _EXISTING | (os.O_DIRECTORY if directory else 0))


def _create(parent_fd: int, name: str, *, directory: bool) -> None:
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent_fd)
        else:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=parent_fd))
    except FileExistsError:  # a link that leads nowhere, or another container was faster: opening it decides
        return


def overlay(layers: Sequence[str], upper: str, work: str, *, user_xattr: bool, add: int = 0) -> int:
    """Return a detached overlay of `layers` (bottom first) under `upper`, with the attributes `add`.

    Layers are handed over one by one: mount(2)'s option page would cut a long list silently. Names above
    255 bytes go as descriptors. Raises: OSError. Source: Documentation/filesystems/overlayfs.rst.
    """
    context_fd = syscalls.fsopen("overlay")
    opened: list[int] = []
    try:
        syscalls.fsconfig_string(context_fd, "source", "overlay")
        for layer in reversed(layers):
            _set_directory(context_fd, "lowerdir+", layer, opened)
        _set_directory(context_fd, "upperdir", upper, opened)
        _set_directory(context_fd, "workdir", work, opened)
        if user_xattr:
            syscalls.fsconfig_flag(context_fd, "userxattr")
        syscalls.fsconfig_create(context_fd)
        return syscalls.fsmount(context_fd, add)
    finally:
        for descriptor in (*opened, context_fd):
            os.close(descriptor)


def _set_directory(context_fd: int, key: str, path: str, opened: list[int]) -> None:
    if len(os.fsencode(path)) <= syscalls.FSCONFIG_STRING_MAX:
        syscalls.fsconfig_string(context_fd, key, path)
        return
    opened.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        syscalls.fsconfig_fd(context_fd, key, opened[-1])
    except OSError:  # before Linux 6.13 overlay takes names only
        syscalls.fsconfig_string(context_fd, key, f"/proc/self/fd/{opened[-1]}")


def bind_tree(source: str, *, recursive: bool, add: int = 0) -> int:
    """Return a detached copy of the tree at `source`, with the attributes `add` on all of it."""
    flags = syscalls.AT_RECURSIVE if recursive else 0
    tree_fd = syscalls.open_tree(syscalls.AT_FDCWD, source, syscalls.OPEN_TREE_CLONE | flags)
    _set_attributes(tree_fd, flags, add, 0)
    return tree_fd


def attach(tree_fd: int, root_fd: int, target: str, *, directory: bool) -> None:
    """Attach and close the detached mount `tree_fd` on `target` in the root."""
    try:
        target_fd = make_target(root_fd, target, directory=directory)
        try:
            syscalls.move_mount(tree_fd, target_fd)
        finally:
            os.close(target_fd)
    finally:
        os.close(tree_fd)
