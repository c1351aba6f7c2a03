"""What this host allows a container to be, found out by doing it once in a fresh process.

Every answer is why not, or None: a kernel's version says little about what a distribution has switched off.
"""

from __future__ import annotations

import os
import sys

from mlenv.container import cgroups, mounts, namespaces, record, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def host() -> dict[str, Any]:
    """Return the facts, from a fresh process: a threaded one may make no user namespace.

    Keys: `user_namespace`, `id_ranges`, `overlay`, `user_overlay`, `cgroup_writable`: None, or why not;
    `cgroups`: `v1`, `v2` or `none`.
    """
    import subprocess

    core = os.path.join(os.path.dirname(__file__), "__main__.py")
    done = subprocess.run([sys.executable, "-I", "-S", core, "probe"], capture_output=True, check=True)
    facts: dict[str, Any] = record.parse(done.stdout.decode())
    return facts


def facts() -> dict[str, Any]:
    """Return the facts; this process must be single-threaded."""
    group = cgroups.plan(f"probe-{os.getpid()}", {"pids": {"limit": 64}})
    cgroups.create(group, {"pids": {"limit": 64}})
    group.remove()
    return {
        "user_namespace": _tried(_user_namespace),
        "id_ranges": "root needs none" if os.geteuid() == 0 else namespaces.plan({}).reason,
        "overlay": _tried(_overlay) if os.geteuid() == 0 else "only root can without a user namespace",
        "user_overlay": _tried(_user_overlay),
        "cgroups": cgroups.mode(),
        "cgroup_writable": "; ".join(group.problems) or None,
    }


def _tried(attempt: Callable[[], object]) -> str | None:
    """Run `attempt` in a child of its own and return why it failed."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt()
        except OSError as error:
            os.write(write_fd, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as answer:
        reason = answer.read().decode(errors="replace")
    os.waitpid(child, 0)
    return reason or None


def _user_namespace() -> None:
    """Become root of a new user namespace, and mount in it: AppArmor lets some create one and use none."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    for name, value in (("uid_map", f"0 {uid} 1"), ("setgroups", "deny"), ("gid_map", f"0 {gid} 1")):
        file_fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        os.write(file_fd, value.encode())
        os.close(file_fd)
    _private_tmpfs()


def _private_tmpfs() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount_setattr(
        syscalls.AT_FDCWD, "/", flags=syscalls.AT_RECURSIVE, propagation=syscalls.MS_PRIVATE
    )
    syscalls.mount("tmpfs", "/tmp", "tmpfs", 0, "mode=700")  # noqa: S108 - in a mount namespace of our own


def _user_overlay() -> None:
    _user_namespace()
    _overlay(user_xattr=True)


def _overlay(*, user_xattr: bool = False) -> None:
    _private_tmpfs()
    for name in ("lower", "upper", "work"):
        os.mkdir(f"/tmp/{name}")  # noqa: S108
    tree_fd = mounts.overlay(["/tmp/lower"], "/tmp/upper", "/tmp/work", user_xattr=user_xattr)  # noqa: S108
    os.close(tree_fd)
