"""Reading an OCI bundle: `config.json`, checked strictly, as one value for the rest of the core.

A field that the core does not carry out is refused, never ignored. What OCI has no field for rides in
annotations.

Source: OCI runtime-spec 1.0.2, config.md and config-linux.md.
"""

from __future__ import annotations

import os

from mlenv.container import record, seccomp
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

LAYERS = "dev.mlenv.layers"
"""JSON array of absolute host directories, bottom first: the overlay's lower layers."""
UPPER = "dev.mlenv.upper"
"""Host directory that takes what is written; without layers it is the root itself."""
NETWORK = "dev.mlenv.network"
PORTS = "dev.mlenv.ports"
NAME = "dev.mlenv.name"
IMAGE = "dev.mlenv.image"
ENVIRONMENT = "dev.mlenv.environment"
LOCK = "dev.mlenv.lock"
INIT = "dev.mlenv.init"
"""`true` puts mlenv's init in front of the process: it reaps and passes signals on."""
USER = "dev.mlenv.user"
"""`NAME[:GROUP]`, looked up in the root's own /etc/passwd and /etc/group."""
STOP_SIGNAL = "dev.mlenv.stop-signal"

NETWORKS = ("private", "none", "host")
VERSION_PREFIX = "1."

_NAMESPACES = ("user", "mount", "pid", "ipc", "uts", "network", "cgroup")
_IPC_PARAMETERS = tuple(
    f"kernel.{name}"
    for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)
_SHAPE: dict[str, Any] = {
    "ociVersion": str,
    "hostname": str,
    "domainname": str,
    "annotations": dict,
    "root": {"path": str, "readonly": bool},
    "process": {
        "terminal": bool,
        "consoleSize": {"height": int, "width": int},
        "user": {"uid": int, "gid": int, "umask": int, "additionalGids": [int]},
        "args": [str],
        "env": [str],
        "cwd": str,
        "capabilities": {
            kind: [str] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")
        },
        "rlimits": [{"type": str, "soft": int, "hard": int}],
        "noNewPrivileges": bool,
        "oomScoreAdj": int,
    },
    "mounts": [{"destination": str, "source": str, "type": str, "options": [str]}],
    "linux": {
        "namespaces": [{"type": str, "path": str}],
        "uidMappings": [{"containerID": int, "hostID": int, "size": int}],
        "gidMappings": [{"containerID": int, "hostID": int, "size": int}],
        "devices": [
            {"type": str, "path": str, "major": int, "minor": int, "fileMode": int, "uid": int, "gid": int}
        ],
        "cgroupsPath": str,
        "resources": {
            "devices": [{"allow": bool, "type": str, "major": int, "minor": int, "access": str}],
            "memory": {"limit": int, "reservation": int, "swap": int},
            "cpu": {"shares": int, "quota": int, "period": int, "cpus": str, "mems": str},
            "pids": {"limit": int},
        },
        "maskedPaths": [str],
        "readonlyPaths": [str],
        "rootfsPropagation": str,
        "sysctl": dict,
        "seccomp": {
            "defaultAction": str,
            "defaultErrnoRet": int,
            "architectures": [str],
            "flags": [str],
            "syscalls": [
                {
                    "names": [str],
                    "action": str,
                    "errnoRet": int,
                    "args": [{"index": int, "value": int, "valueTwo": int, "op": str}],
                }
            ],
        },
    },
}
"""Every field that is carried out, with its type; a list holds the shape of its members."""


class Bundle:
    """A bundle whose configuration has been checked.

    `config` is the parsed config.json; `system_call_filter` its seccomp profile assembled; `layers`
    bottom first; `upper` and `work` are None where nothing is overlaid.
    """

    __slots__ = (
        "annotations",
        "config",
        "layers",
        "linux",
        "namespaces",
        "path",
        "process",
        "root",
        "system_call_filter",
        "upper",
        "work",
    )

    def __init__(self, path: str, config: dict[str, Any], system_call_filter: bytes | None) -> None:
        self.path = path
        self.system_call_filter = system_call_filter
        self.config = config
        self.process: dict[str, Any] = config["process"]
        self.linux: dict[str, Any] = config.get("linux", {})
        self.annotations: dict[str, str] = config.get("annotations", {})
        self.namespaces: dict[str, str | None] = {
            entry["type"]: entry.get("path") for entry in self.linux.get("namespaces", ())
        }
        self.layers: list[str] = record.parse(self.annotations.get(LAYERS, "[]"))
        upper = self.annotations.get(UPPER)
        self.work: str | None = None
        if self.layers:
            self.upper: str | None = upper or os.path.join(path, "upper")
            self.work = f"{upper}.work" if upper else os.path.join(path, "work")
            self.root = os.path.join(path, "rootfs")
        else:
            self.upper = None
            self.root = upper or os.path.join(path, config["root"]["path"])

    @property
    def network(self) -> str:
        """Return the network mode; by OCI alone it is an empty namespace or the host's."""
        default = "none" if "network" in self.namespaces else "host"
        return self.annotations.get(NETWORK, default)

    @property
    def ports(self) -> list[dict[str, Any]]:
        """Return what the shim publishes."""
        return list(record.parse(self.annotations.get(PORTS, "[]")))

    @property
    def wants_init(self) -> bool:
        """Whether mlenv's init stands in front of the process."""
        return self.annotations.get(INIT) == "true"

    @property
    def writes_names(self) -> bool:
        """Whether the core provides /etc/hosts, /etc/hostname and /etc/resolv.conf."""
        return NETWORK in self.annotations


def read(path: str) -> Bundle:
    """Return the bundle in the directory `path`.

    Raises: ContainerError naming every field that is unknown, unsupported or of the wrong type.
    """
    path = os.path.abspath(path)
    file = os.path.join(path, "config.json")
    try:
        config = record.read(file)
    except (OSError, ValueError) as error:
        raise ContainerError(f"cannot read `{file}`", cause=str(error)) from error
    faults = check(config)
    program = None
    if not faults and "seccomp" in config.get("linux", {}):
        try:
            program = seccomp.assemble(config["linux"]["seccomp"], os.uname().machine)
        except (ValueError, KeyError) as error:
            faults.append(f"linux.seccomp: {error}")
    if faults:
        raise ContainerError(f"`{file}` asks for what mlenv cannot do", cause="\n".join(faults))
    return Bundle(path, config, program)


def check(config: object) -> list[str]:
    """Return the faults of a runtime configuration, each with the place of its field."""
    faults: list[str] = []
    _check_shape(config, _SHAPE, "", faults)
    if isinstance(config, dict) and not faults:
        _check_values(config, faults)
    return faults


def _check_shape(value: object, shape: Any, place: str, faults: list[str]) -> None:
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            faults.append(f"{place or 'config'}: must be an object")
            return
        for key, member in value.items():
            inner = f"{place}.{key}" if place else key
            if key not in shape:
                faults.append(f"{inner}: not supported")
            else:
                _check_shape(member, shape[key], inner, faults)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            faults.append(f"{place}: must be an array")
            return
        if shape == [str] and all(type(member) is str for member in value):
            return
        for index, member in enumerate(value):
            _check_shape(member, shape[0], f"{place}[{index}]", faults)
    elif not isinstance(value, shape) or (shape is int and isinstance(value, bool)):
        faults.append(f"{place}: must be of type {shape.__name__}")


def _check_values(config: Mapping[str, Any], faults: list[str]) -> None:
    if not str(config.get("ociVersion", "")).startswith(VERSION_PREFIX):
        faults.append(f"ociVersion: {config.get('ociVersion')!r} is not 1.x")
    process = config.get("process")
    if not process or not process.get("args"):
        faults.append("process.args: required, with at least one word")
    elif not str(process.get("cwd", "")).startswith("/"):
        faults.append("process.cwd: must be an absolute path")
    if process:
        faults += [
            f"process.env: `{entry}` has no `=`" for entry in process.get("env", ()) if "=" not in entry
        ]
    faults += [f"a NUL byte in {text!r}" for text in _strings(config) if "\0" in text]
    _check_annotations(config, faults)
    if "root" not in config and LAYERS not in config.get("annotations", {}):
        faults.append("root: required")
    _check_linux(config.get("linux", {}), faults)
    for index, mount in enumerate(config.get("mounts", ())):
        if not mount.get("destination", "").startswith("/"):
            faults.append(f"mounts[{index}].destination: must be an absolute path")


def _strings(value: object) -> list[str]:
    """Return every string in a JSON value but the seccomp profile's, which are looked up and go nowhere."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, member in value.items() if key != "seccomp" for text in _strings(member)]
    if isinstance(value, list):
        return [text for member in value for text in _strings(member)]
    return []


def _check_annotations(config: Mapping[str, Any], faults: list[str]) -> None:
    annotations = config.get("annotations", {})
    for key, value in annotations.items():
        if not isinstance(value, str):
            faults.append(f"annotations.{key}: must be a string")
            return
    for key in (LAYERS, PORTS):
        try:
            listed = record.parse(annotations.get(key, "[]"))
        except ValueError as error:
            faults.append(f"annotations.{key}: {error}")
            continue
        if not isinstance(listed, list):
            faults.append(f"annotations.{key}: must be a JSON array")
        elif key == LAYERS and not all(isinstance(layer, str) and layer.startswith("/") for layer in listed):
            faults.append(f"annotations.{key}: must hold absolute paths")
    if annotations.get(NETWORK, "none") not in NETWORKS:
        faults.append(f"annotations.{NETWORK}: must be one of {', '.join(NETWORKS)}")


def _check_linux(linux: Mapping[str, Any], faults: list[str]) -> None:
    for index, entry in enumerate(linux.get("namespaces", ())):
        if entry.get("type") not in _NAMESPACES:
            faults.append(f"linux.namespaces[{index}].type: `{entry.get('type')}` is not supported")
    if linux.get("rootfsPropagation", "private") not in ("private", "rprivate", "slave", "rslave"):
        faults.append(f"linux.rootfsPropagation: `{linux['rootfsPropagation']}` is not supported")
    _check_sysctl(linux, faults)
    profile = linux.get("seccomp", {})
    if profile.get("flags"):
        faults.append("linux.seccomp.flags: not supported")
    faults += [
        f"linux.seccomp.architectures: `{name}` is not supported"
        for name in profile.get("architectures", ())
        if name not in seccomp.KNOWN_ARCHITECTURES
    ]


def _check_sysctl(linux: Mapping[str, Any], faults: list[str]) -> None:
    """Refuse every kernel parameter that is not of a namespace of the container's own: it is the host's."""
    own = {entry.get("type") for entry in linux.get("namespaces", ()) if not entry.get("path")}
    for key, value in linux.get("sysctl", {}).items():
        kind = _namespace_of(key)
        if not isinstance(value, str):
            faults.append(f"linux.sysctl.{key}: must be a string")
        if kind is None:
            faults.append(f"linux.sysctl.{key}: belongs to the host, not to a container")
        elif kind not in own:
            faults.append(f"linux.sysctl.{key}: needs a {kind} namespace of the container's own")


def _namespace_of(key: str) -> str | None:
    """Return the namespace that has the kernel parameter, None where it is the host's alone."""
    if "/" in key:
        return None
    if key in _IPC_PARAMETERS or key.startswith("fs.mqueue."):
        return "ipc"
    if key in ("kernel.domainname", "kernel.hostname"):
        return "uts"
    return "network" if key.startswith("net.") else None
