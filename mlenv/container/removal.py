"""Deleting a container's directory, with what its users wrote into it.

In an ordinary user's container files belong to subordinate ids, and overlay leaves a directory nobody may
enter: these are deleted from inside a user namespace with the same map.
"""

from __future__ import annotations

import os
import stat


def remove(directory: str) -> None:
    """Delete `directory` and all below it; one that is not there is no error.

    Raises: OSError for what cannot be deleted even as the container's root.
    """
    doomed = f"{directory}.{os.getpid()}.gone"
    try:
        os.rename(directory, doomed)
    except FileNotFoundError:
        return
    try:
        remove_tree(doomed)
    except PermissionError:
        if os.geteuid() == 0:
            raise
        _remove_mapped(doomed)


def remove_tree(path: str) -> None:
    """Delete a tree; directories without permission for us get it first. Links are not followed."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    parent_fd = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _remove_directory(os.path.basename(path), parent_fd)
    finally:
        os.close(parent_fd)


def _remove_directory(name: str, parent_fd: int) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        directory_fd = os.open(name, flags, dir_fd=parent_fd)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent_fd)
        directory_fd = os.open(name, flags, dir_fd=parent_fd)
    try:
        mode = os.fstat(directory_fd).st_mode
        if mode & 0o300 != 0o300:  # noqa: PLR2004 - write and search for the owner
            os.fchmod(directory_fd, 0o700)
        with os.scandir(directory_fd) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for entry_name, is_directory in found:
            if is_directory:
                _remove_directory(entry_name, directory_fd)
            else:
                os.unlink(entry_name, dir_fd=directory_fd)
    finally:
        os.close(directory_fd)
    os.rmdir(name, dir_fd=parent_fd)


def _remove_mapped(path: str) -> None:
    """Delete a tree as root of a user namespace like the container's was; needs a single-threaded process."""
    from mlenv.container import namespaces, syscalls

    request_read, request_write = os.pipe()
    go_read, go_write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(request_write, b"u")
            os.close(go_write)
            if os.read(go_read, 1):
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                remove_tree(path)
                status = 0
        finally:
            os._exit(status)
    for descriptor in (request_write, go_read):
        os.close(descriptor)
    try:
        if os.read(request_read, 1):
            namespaces.write_map(namespaces.plan({}), child)
            os.write(go_write, b"g")
    finally:
        os.close(go_write)
        os.close(request_read)
        _, status = os.waitpid(child, 0)
    if status:
        raise PermissionError(1, "cannot delete what the container's users wrote", path)
