"""Writing an OCI runtime configuration: from what a caller wants to the dict that goes into `config.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlenv.container import record, seccomp
from mlenv.container.bundle import (
    ENVIRONMENT,
    IMAGE,
    INIT,
    LAYERS,
    LOCK,
    NAME,
    NETWORK,
    PORTS,
    STOP_SIGNAL,
    UPPER,
    USER,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "ENVIRONMENT",
    "IMAGE",
    "INIT",
    "LAYERS",
    "LOCK",
    "NAME",
    "NETWORK",
    "OCI_VERSION",
    "PORTS",
    "STOP_SIGNAL",
    "UPPER",
    "USER",
    "Mount",
    "Port",
    "Resources",
    "runtime_config",
]

OCI_VERSION = "1.0.2"
DEFAULT_PIDS = 4096
"""Most processes of a container that asks for no other number: enough for data loaders, too few for a fork
bomb."""

CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""What a container's root may do: moby's fourteen without MKNOD, and without NET_RAW for ordinary users.

With MKNOD root opens any disk of the host where no version 1 devices controller stands in its way.
"""
ROOT_CAPABILITIES = ("CAP_NET_RAW",)

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_CPU_PERIOD = 100_000
"""Period of the CPU quota in microseconds, as Docker's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """A host directory or file that appears in the container."""

    source: Path
    target: PurePosixPath
    readonly: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """A host port that leads to one of the container's; host port 0 takes a free one."""

    host_ip: str = "127.0.0.1"
    host_port: int
    container_port: int
    protocol: str = "tcp"

    def as_dict(self) -> dict[str, Any]:
        """Return the port as the annotation and the state hold it."""
        return {
            "host_ip": self.host_ip,
            "host_port": self.host_port,
            "container_port": self.container_port,
            "protocol": self.protocol,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Limits: memory and /dev/shm in bytes, CPUs as a number of cores, processes.

    None is no limit of ours.
    """

    memory: int | None = None
    cpus: float | None = None
    pids: int | None = field(default=DEFAULT_PIDS)
    shm: int | None = None


def runtime_config(
    *,
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: str = "/",
    user: str | None = None,
    hostname: str | None = None,
    terminal: bool = False,
    layers: Sequence[Path] = (),
    mounts: Sequence[Mount] = (),
    resources: Resources | None = None,
    readonly: bool = False,
    network: str = "private",
    ports: Sequence[Port] = (),
    annotations: Mapping[str, str] | None = None,
    device_edits: Mapping[str, Any] | None = None,
    ignore_chown: bool = False,
    upper: Path | None = None,
    init: bool = True,
) -> dict[str, Any]:
    """Return the OCI configuration of a container.

    `user` is `UID[:GID]` or names of the root's own passwd file. `device_edits` are CDI container edits
    (`deviceNodes`, `mounts`, `env`, `additionalGids`). With `layers` empty `upper` is the root itself.
    `init` puts a reaper in front of the process.
    """
    limits = resources or Resources()
    capabilities = list(CAPABILITIES + ROOT_CAPABILITIES) if os.geteuid() == 0 else list(CAPABILITIES)
    edits = device_edits or {}
    config: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "root": {"path": "rootfs", "readonly": readonly},
        "process": _process(args, env, cwd, terminal=terminal, capabilities=capabilities),
        "mounts": [*_system_mounts(limits, network), *(_bind(mount) for mount in mounts)],
        "linux": {
            "namespaces": [{"type": kind} for kind in _namespaces(network)],
            "resources": _resources(limits),
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
            "seccomp": seccomp.default_profile(capabilities, ignore_chown=ignore_chown),
        },
        "annotations": _annotations(annotations, layers, upper, network, ports, init=init),
    }
    if hostname:
        config["hostname"] = hostname
    _set_user(config, user)
    _apply_edits(config, edits)
    return config


def _process(
    args: Sequence[str], env: Mapping[str, str], cwd: str, *, terminal: bool, capabilities: list[str]
) -> dict[str, Any]:
    sets = dict.fromkeys(("bounding", "effective", "permitted"), capabilities)
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": [f"{key}={value}" for key, value in env.items()],
        "cwd": cwd,
        "capabilities": {**sets, "inheritable": [], "ambient": []},
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": 1048576, "hard": 1048576},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_MEMLOCK", "soft": 2**64 - 1, "hard": 2**64 - 1},
        ],
        "noNewPrivileges": True,
    }


def _namespaces(network: str) -> tuple[str, ...]:
    kinds = ("mount", "pid", "ipc", "uts", "cgroup")
    user = () if os.geteuid() == 0 else ("user",)
    return (*user, *kinds) if network == "host" else (*user, *kinds, "network")


def _system_mounts(limits: Resources, network: str) -> list[dict[str, Any]]:
    shared = limits.shm or limits.memory or _half_of_memory()
    sysfs = {
        "destination": "/sys",
        "type": "sysfs",
        "source": "sysfs",
        "options": ["nosuid", "noexec", "nodev", "ro"],
    }
    if network == "host" and os.geteuid() != 0:  # a new sysfs needs the owner of the network namespace
        sysfs = {
            "destination": "/sys",
            "type": "bind",
            "source": "/sys",
            "options": ["rbind", "nosuid", "noexec", "nodev", "rro"],
        }
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {
            "destination": "/dev/shm",  # noqa: S108 - the container's
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", f"size={shared}"],
        },
        {
            "destination": "/dev/mqueue",
            "type": "mqueue",
            "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"],
        },
        sysfs,
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
        },
    ]


def _half_of_memory() -> int:
    """Return half of this machine's memory in bytes.

    Docker's 64 MB kill PyTorch's data loaders with a bus error; the pages count only once they are written.
    """
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _bind(mount: Mount) -> dict[str, Any]:
    options = ["rbind", "nosuid", "nodev", "rro" if mount.readonly else "rw"]
    return {
        "destination": str(mount.target),
        "type": "bind",
        "source": str(Path(mount.source).absolute()),
        "options": options,
    }


def _resources(limits: Resources) -> dict[str, Any]:
    resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
    if limits.memory is not None:
        resources["memory"] = {"limit": limits.memory}
    if limits.cpus is not None:
        resources["cpu"] = {"period": _CPU_PERIOD, "quota": round(limits.cpus * _CPU_PERIOD)}
    if limits.pids is not None:
        resources["pids"] = {"limit": limits.pids}
    return resources


def _annotations(
    given: Mapping[str, str] | None,
    layers: Sequence[Path],
    upper: Path | None,
    network: str,
    ports: Sequence[Port],
    *,
    init: bool,
) -> dict[str, str]:
    annotations = dict(given or {})
    annotations[NETWORK] = network
    if init:
        annotations[INIT] = "true"
    if layers:
        annotations[LAYERS] = _json([str(layer) for layer in layers])
    if upper is not None:
        annotations[UPPER] = str(upper)
    if ports:
        annotations[PORTS] = _json([port.as_dict() for port in ports])
    return annotations


def _json(value: Any) -> str:
    return record.serialise(value).decode().strip()


def _set_user(config: dict[str, Any], user: str | None) -> None:
    if not user:
        return
    uid, _, gid = user.partition(":")
    if uid.isdigit() and gid.isdigit():
        config["process"]["user"] = {"uid": int(uid), "gid": int(gid)}
    else:
        config["annotations"][USER] = user


def _apply_edits(config: dict[str, Any], edits: Mapping[str, Any]) -> None:
    """Apply CDI container edits. Source: CDI specification 1.1.0, "OCI Edits"."""
    process = config["process"]
    process["env"] = [*process["env"], *edits.get("env", ())]
    if edits.get("additionalGids"):
        process["user"]["additionalGids"] = list(edits["additionalGids"])
    for node in edits.get("deviceNodes", ()):
        device = _device(node)
        config["linux"].setdefault("devices", []).append(device)
        config["linux"]["resources"]["devices"].append(
            {
                "allow": True,
                "type": device["type"],
                "major": device["major"],
                "minor": device["minor"],
                "access": node.get("permissions") or "rw",
            }
        )
    config["mounts"] += [
        {
            "destination": mount["containerPath"],
            "source": mount["hostPath"],
            "type": mount.get("type") or "bind",
            "options": list(mount.get("options") or ["rbind", "ro", "nosuid", "nodev"]),
        }
        for mount in edits.get("mounts", ())
    ]


def _device(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the OCI device of a CDI node; what the node leaves out comes from the host's file."""
    found = os.stat(node.get("hostPath") or node["path"])
    device = {
        "path": node["path"],
        "type": node.get("type") or "c",
        "major": node.get("major", os.major(found.st_rdev)),
        "minor": node.get("minor", os.minor(found.st_rdev)),
        "fileMode": node.get("fileMode", found.st_mode & 0o7777),
    }
    return device | {key: node[key] for key in ("uid", "gid") if key in node}
