"""What stands around a container's process on the host: control groups, network, forwarder.

Made once, undone once.

All of it is noted as plain JSON before it is made, so that whoever finds the note of a killed owner can
undo it too.
"""

from __future__ import annotations

import os

from mlenv.container import cgroups, namespaces, process, rootfs, state
from mlenv.errors import ContainerStartError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from mlenv.container.bundle import Bundle
    from mlenv.container.forward import Listener

_SIGKILL = 9
_REMOVAL_TRIES = 200
_REMOVAL_PAUSE = 10
"""Milliseconds between two looks at a group whose last process is still being taken apart."""


def start(
    bundle: Bundle,
    known: dict[str, Any],
    directory: str,
    *,
    stdio: Sequence[int] = (0, 1, 2),
    note: Callable[[dict[str, Any]], None],
) -> process.Started:
    """Start the bundle's process with all that it needs around it.

    `known` is the container's note, `note` writes it. Raises: ContainerError; `undo(known)` then removes
    what is there.
    """
    resources = bundle.linux.get("resources", {})
    id_map = namespaces.plan(bundle.linux)
    group = cgroups.plan(known["id"], resources, path=bundle.linux.get("cgroupsPath"))
    known["cgroup"] = {"version": group.version, "directories": group.directories}
    note(known)
    cgroups.create(group, resources)

    def connect(pid: int) -> None:
        known["init"] = state.identity(pid)
        if bundle.network == "private":
            from mlenv.container import net

            rootless = id_map.needs_namespace
            known["network"] = net.setup("private", known["id"], pid, rootless=rootless, state_dir=directory)
            _write_hosts(bundle, known["network"].get("address"))
        note(known)

    write_names(bundle, known["id"])
    plan = process.Plan(bundle, group, id_map, stdio)
    if not id_map.needs_namespace and rootfs.opens_devices(bundle, plan.mounts):
        plan.problems += cgroups.open_devices(group, resources)
    try:
        started = process.start(plan, connect=connect)
    except ContainerStartError as error:
        raise _explained(error, group) from error
    known["users"] = started.id_map.mode
    known["user_reason"] = started.id_map.reason
    known["warnings"] = [*plan.problems, *group.problems, *known.get("network", {}).get("warnings", ())]
    return started


def _explained(error: ContainerStartError, group: cgroups.Group) -> ContainerStartError:
    """Return the error of a start, or the one that lies behind it: the memory did not suffice for it."""
    if not group.out_of_memory_kills():
        return error
    return ContainerStartError(
        "the container ran out of memory while it was being started",
        cause="the kernel killed its first process: the memory limit is too low",
        hint="give it more, a few megabytes at least: `--memory 64MB`, or `resources: memory:` in the spec",
    )


def publish(listeners: Sequence[Listener], known: dict[str, Any], directory: str) -> None:
    """Start the forwarder of the container's ports; the listening sockets move into it."""
    from mlenv.container import forward

    known["forwarder"] = forward.start(
        listeners,
        known["init"]["pid"],
        rootless=known["users"] != "root",
        log=os.path.join(directory, "forward.log"),
        address=known.get("network", {}).get("address"),
    )
    forward.close(listeners)


def undo(known: dict[str, Any]) -> list[str]:
    """End and remove everything the note names; return what could not be removed. May be repeated."""
    state.kill_exactly(known.get("init"), _SIGKILL)
    forwarder = known.pop("forwarder", None)
    if forwarder:
        from mlenv.container import companion

        companion.end(forwarder)
    network = known.pop("network", None)
    if network:
        from mlenv.container import net

        net.teardown(network)
    group = state.group_of(known)
    known["out_of_memory_kills"] = known.get("out_of_memory_kills", 0) + group.out_of_memory_kills()
    held = _remove_group(group)
    if not held:
        known.pop("cgroup", None)
    return held


def _remove_group(group: cgroups.Group) -> list[str]:
    """Remove the groups; a group that can be removed has no process, so that nothing is killed before."""
    held = group.remove()
    if not held:
        return held
    import select

    for _ in range(_REMOVAL_TRIES):
        group.kill()
        select.poll().poll(_REMOVAL_PAUSE)
        held = group.remove()
        if not held:
            break
    return held


def write_names(bundle: Bundle, container_id: str) -> None:
    """Write the hosts, hostname and resolv.conf that the container sees, into the bundle."""
    if not bundle.writes_names:
        return
    bundle.config.setdefault("hostname", container_id[:12])
    _replace(bundle, "hostname", f"{bundle.config['hostname']}\n".encode())
    _replace(bundle, "resolv.conf", _resolv_conf(bundle.network))
    _write_hosts(bundle, None)


def _write_hosts(bundle: Bundle, address: str | None) -> None:
    """Write /etc/hosts; the file exists before, so a mount of it shows the new content."""
    if bundle.writes_names:
        own = f"{address or '127.0.1.1'}\t{bundle.config['hostname']}\n"
        _replace(
            bundle,
            "hosts",
            f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}".encode(),
        )


def _replace(bundle: Bundle, name: str, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    file_fd = os.open(os.path.join(bundle.path, name), flags, 0o644)
    try:
        os.write(file_fd, content)
    finally:
        os.close(file_fd)


def _resolv_conf(network: str) -> bytes:
    if network == "private":
        from mlenv.container import net

        return net.resolv_conf(network)
    if network == "none":
        return b""
    try:
        with open("/etc/resolv.conf", "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""
