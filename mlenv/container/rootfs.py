"""The container's root: assembled in a fresh mount namespace, then made the root.

Source: OCI runtime-spec 1.0.2 config.md "Root"; pivot_root(2) "pivot_root(".", ".")".
"""

from __future__ import annotations

import os
import stat

from mlenv.container import devices, mounts, syscalls
from mlenv.container.bundle import UPPER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlenv.container.bundle import Bundle

SKELETON = "skeleton"
"""Directory in the bundle with the mount points: the overlay's lowest layer, so `upper` gets none."""
NAME_FILES = ("hosts", "hostname", "resolv.conf")
_NULL_DEVICE = os.makedev(1, 3)


def prepare_directories(bundle: Bundle, planned: Sequence[mounts.Mount]) -> None:
    """Make, as the invoking user, what the overlay and the mounts need before any namespace exists."""
    if not bundle.layers:
        return
    for directory in (bundle.root, bundle.upper, bundle.work):
        if directory:
            os.makedirs(directory, 0o755, exist_ok=True)
    skeleton = os.path.join(bundle.path, SKELETON)
    os.makedirs(skeleton, 0o755, exist_ok=True)
    for mount in planned:
        _skeleton_entry(skeleton, mount.target, directory=not mount.is_bind or os.path.isdir(mount.source))
    if bundle.writes_names:
        for name in NAME_FILES:
            _skeleton_entry(skeleton, f"/etc/{name}", directory=False)


def _skeleton_entry(skeleton: str, target: str, *, directory: bool) -> None:
    parts = [part for part in target.split("/") if part]
    if not parts or ".." in parts:
        return
    path = os.path.join(skeleton, *parts)
    try:
        os.makedirs(path if directory else os.path.dirname(path), 0o755, exist_ok=True)
        if not directory:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    except (
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
    ):  # two targets contradict: mounting says so
        return


def open_root(bundle: Bundle, *, in_user_namespace: bool, devices_work: bool = True) -> int:
    """Mount the bundle's root in this mount namespace and return it opened with O_PATH.

    `devices_work` says whether device files in it can be opened.
    """
    syscalls.mount_setattr(
        syscalls.AT_FDCWD,
        "/",
        flags=syscalls.AT_RECURSIVE,
        propagation=syscalls.MS_SLAVE if _wants_slave(bundle) else syscalls.MS_PRIVATE,
    )
    add = 0 if devices_work else syscalls.MOUNT_ATTR_NODEV
    if bundle.layers and bundle.upper and bundle.work:
        layers = [os.path.join(bundle.path, SKELETON), *bundle.layers]
        tree_fd = mounts.overlay(layers, bundle.upper, bundle.work, user_xattr=in_user_namespace, add=add)
    else:
        tree_fd = mounts.bind_tree(bundle.root, recursive=True, add=add)
    target_fd = os.open(bundle.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.move_mount(tree_fd, target_fd)
    finally:
        os.close(target_fd)
        os.close(tree_fd)
    return os.open(bundle.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _needs_devices(bundle: Bundle, planned: Sequence[mounts.Mount]) -> bool:
    """Whether device files in the root itself must work: a foreign bundle's may, ours are in /dev alone."""
    ours = bundle.layers or UPPER in bundle.annotations
    in_dev = all(device["path"].startswith("/dev/") for device in bundle.linux.get("devices", ()))
    return not (ours and in_dev and any(mount.target == "/dev" for mount in planned))


def opens_devices(bundle: Bundle, planned: Sequence[mounts.Mount]) -> bool:
    """Whether a process of root's could open a device of the host that no rule of a control group denies."""
    held = bundle.process.get("capabilities", {}).get("bounding", ())
    return "CAP_MKNOD" in held or _needs_devices(bundle, planned)


def _wants_slave(bundle: Bundle) -> bool:
    return "slave" in bundle.linux.get("rootfsPropagation", "private")


def assemble(
    bundle: Bundle,
    planned: Sequence[mounts.Mount],
    groups: Sequence[tuple[str, str]],
    *,
    in_user_namespace: bool,
    mapped_gids: int,
) -> int:
    """Build the root with everything in it and return it opened; the working directory stays on the host.

    `groups` are (name, host directory) of the container's cgroups; gids from `mapped_gids` on do not
    exist here.
    """
    root_fd = open_root(
        bundle, in_user_namespace=in_user_namespace, devices_work=_needs_devices(bundle, planned)
    )
    filled_dev = False
    for mount in planned:
        if mount.kind in ("cgroup", "cgroup2"):
            _show_groups(root_fd, mount, groups)
            continue
        if mount.kind == "devpts":
            mount.data = [
                (key, value) for key, value in mount.data if key != "gid" or int(value or 0) < mapped_gids
            ]
        _apply(mount, root_fd)
        if mount.target == "/dev" and not mount.is_bind:
            devices.populate(root_fd, bundle.linux.get("devices", ()), make_nodes=not in_user_namespace)
            filled_dev = True
    if not filled_dev:
        for device in bundle.linux.get("devices", ()):
            devices.add(root_fd, device, make_nodes=not in_user_namespace)
    if bundle.writes_names:
        _bind_name_files(bundle, root_fd)
    return root_fd


def _apply(mount: mounts.Mount, root_fd: int) -> None:
    try:
        mount.apply(root_fd)
    except PermissionError:
        if mount.kind != "sysfs":
            raise
        # A new sysfs needs the owner of the network namespace; the host's, read-only, shows the same devices.
        fallback = mounts.Mount(kind="bind", source="/sys", target=mount.target)
        fallback.recursive, fallback.add_all = True, mount.add | syscalls.MOUNT_ATTR_RDONLY
        fallback.apply(root_fd)


def _bind_name_files(bundle: Bundle, root_fd: int) -> None:
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    for name in NAME_FILES:
        source = os.path.join(bundle.path, name)
        if os.path.exists(source):
            tree_fd = mounts.bind_tree(source, recursive=False, add=attributes)
            mounts.attach(tree_fd, root_fd, f"/etc/{name}", directory=False)


def _show_groups(root_fd: int, mount: mounts.Mount, groups: Sequence[tuple[str, str]]) -> None:
    """Show the container its own cgroups; without any, /sys/fs/cgroup stays empty.

    The directories are bound from the host: in the container's cgroup namespace they are its root.
    """
    if not groups:
        return
    if len(groups) == 1 and not groups[0][0]:
        tree_fd = mounts.bind_tree(groups[0][1], recursive=False, add=mount.add)
        mounts.attach(tree_fd, root_fd, mount.target, directory=True)
        return
    holder = mounts.Mount(kind="tmpfs", source="tmpfs", target=mount.target)
    holder.data = [("mode", "755"), ("size", "64k")]
    holder.add = mount.add & ~syscalls.MOUNT_ATTR_RDONLY
    holder.apply(root_fd)
    for name, directory in groups:
        tree_fd = mounts.bind_tree(directory, recursive=False, add=mount.add)
        mounts.attach(tree_fd, root_fd, f"{mount.target}/{name}", directory=True)
    if mount.add & syscalls.MOUNT_ATTR_RDONLY:
        _change_attributes(root_fd, mount.target, syscalls.MOUNT_ATTR_RDONLY)


def _change_attributes(root_fd: int, path: str, add: int) -> None:
    opened_fd = mounts.open_in_root(root_fd, path)
    try:
        syscalls.mount_setattr(opened_fd, "", flags=syscalls.AT_EMPTY_PATH, add=add)
    finally:
        os.close(opened_fd)


def restrict(bundle: Bundle, root_fd: int) -> None:
    """Hide the masked paths, make the read-only ones so, and the root too where it is asked for."""
    for path in bundle.linux.get("maskedPaths", ()):
        _mask(root_fd, path)
    for path in bundle.linux.get("readonlyPaths", ()):
        _make_readonly(root_fd, path)
    if bundle.config.get("root", {}).get("readonly"):
        syscalls.mount_setattr(root_fd, "", flags=syscalls.AT_EMPTY_PATH, add=syscalls.MOUNT_ATTR_RDONLY)


def _mask(root_fd: int, path: str) -> None:
    """Cover `path`: a directory with an empty read-only tmpfs, anything else with the null device."""
    try:
        target_fd = mounts.open_in_root(root_fd, path)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        if stat.S_ISDIR(os.fstat(target_fd).st_mode):
            empty = mounts.Mount(kind="tmpfs", source="tmpfs", target=path)
            empty.data, empty.add = [("size", "0"), ("nr_inodes", "1")], syscalls.MOUNT_ATTR_RDONLY
            cover_fd = empty.new_filesystem()
        else:
            cover_fd = _null_tree()
        try:
            syscalls.move_mount(cover_fd, target_fd)
        finally:
            os.close(cover_fd)
    finally:
        os.close(target_fd)


def _null_tree() -> int:
    """Return the host's null device as a detached mount, after a look at what it really is."""
    tree_fd = mounts.bind_tree("/dev/null", recursive=False)
    found = os.fstat(tree_fd)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _NULL_DEVICE:
        os.close(tree_fd)
        raise OSError(19, "the host's /dev/null is not the null device")
    return tree_fd


def _make_readonly(root_fd: int, path: str) -> None:
    try:
        target_fd = mounts.open_in_root(root_fd, path)
    except (FileNotFoundError, NotADirectoryError):
        return
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE
    try:
        tree_fd = syscalls.open_tree(target_fd, "", flags)
        try:
            syscalls.mount_setattr(
                tree_fd,
                "",
                flags=syscalls.AT_EMPTY_PATH | syscalls.AT_RECURSIVE,
                add=syscalls.MOUNT_ATTR_RDONLY,
            )
            syscalls.move_mount(tree_fd, target_fd)
        finally:
            os.close(tree_fd)
    finally:
        os.close(target_fd)


def enter(root_fd: int) -> None:
    """Make `root_fd` the root and detach the host's tree. Nothing can be imported from here on."""
    os.fchdir(root_fd)
    os.close(root_fd)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")
