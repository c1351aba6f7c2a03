"""GPUs as CDI says them: a specification of this host's, and the container edits of a selection.

The edits are plain data of CDI's shape, so the core applies ours and those of any other vendor's file
alike, and Podman can use what `specification` returns. No hooks: a library is mounted under each of its
names, where NVIDIA's toolkit makes links with a program of its own.

Source: CDI specification 0.6.0 (cncf-tags/container-device-interface SPEC.md).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlenv.container.gpu import nvidia

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

CDI_VERSION = "0.6.0"
KIND = "nvidia.com/gpu"

_ROOT = Path("/")
_FILE_OPTIONS = ("ro", "nosuid", "nodev", "rbind")
_SOCKET_OPTIONS = ("nosuid", "nodev", "noexec", "rbind")


@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """What a container gets of the host's GPUs, and why it gets none where it does.

    `edits` are CDI container edits (`deviceNodes`, `mounts`, `env`), empty without a GPU.
    """

    gpus: tuple[nvidia.Gpu, ...] = ()
    driver: str | None = None
    edits: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


def inject(
    *,
    mode: str = "auto",
    count: int | None = None,
    ids: Iterable[str] = (),
    memory: int | None = None,
    root: Path = _ROOT,
    nvml: Any = None,
) -> Injection:
    """Return the container edits for a selection of this host's GPUs; see `nvidia.select` for its parameters.

    `auto` on a host without a driver gives no GPU and the reason.

    Raises: GpuNotFoundError where GPUs are asked for that are not there; ContainerError where the driver is
    damaged.
    """
    if mode == "none":
        return Injection(reason="`gpus: none`")
    version = nvidia.driver_version(root)
    available = nvidia.gpus(root, nvml=nvml) if version else ()
    chosen = nvidia.select(available, mode=mode, count=count, ids=ids, memory=memory)
    if version is None:
        return Injection(reason="the kernel runs no NVIDIA driver")
    if not chosen:
        return Injection(driver=version, reason=f"NVIDIA driver {version} runs and shows no GPU that fits")
    driver = nvidia.find_driver(version, root)
    edits = container_edits(specification(driver, chosen, root), [gpu.uuid for gpu in chosen])
    edits["env"] = ["NVIDIA_VISIBLE_DEVICES=" + ",".join(gpu.uuid for gpu in chosen)]
    return Injection(gpus=chosen, driver=version, edits=edits)


def specification(driver: nvidia.Driver, gpus: Sequence[nvidia.Gpu], root: Path = _ROOT) -> dict[str, Any]:
    """Return the CDI specification of `gpus`, named by index and by UUID; `all` are all of them."""
    nodes = {gpu: [_node(path, root) for path in nvidia.gpu_nodes(gpu, root)] for gpu in gpus}
    named = [(name, nodes[gpu]) for gpu in gpus for name in (str(gpu.index), gpu.uuid)]
    named.append(("all", [node for several in nodes.values() for node in several]))
    return {
        "cdiVersion": CDI_VERSION,
        "kind": KIND,
        "containerEdits": {
            "deviceNodes": [_node(path, root) for path in nvidia.control_nodes(root)],
            "mounts": list(_mounts(driver, root)),
        },
        "devices": [{"name": name, "containerEdits": {"deviceNodes": found}} for name, found in named],
    }


def container_edits(spec: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the edits for the devices `names` of a CDI specification: those of all, then each one's.

    Raises: KeyError for a name that the specification has not.
    """
    devices = {device["name"]: device["containerEdits"] for device in spec["devices"]}
    merged: dict[str, Any] = {}
    for edits in (spec.get("containerEdits", {}), *(devices[name] for name in names)):
        for kind, values in edits.items():
            known = merged.setdefault(kind, [])
            known += [value for value in values if value not in known]
    return merged


def _node(path: Path, root: Path) -> dict[str, Any]:
    """Return a device file as a CDI device node. Raises: FileNotFoundError where it is not there."""
    status = os.stat(path)
    container_path = PurePosixPath("/") / path.relative_to(root)
    node = {"path": str(container_path), "hostPath": str(path), "permissions": "rw"}
    if stat.S_ISCHR(status.st_mode):
        numbers = {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
        return node | {"type": "c", "fileMode": status.st_mode & 0o777} | numbers
    return node


def _mounts(driver: nvidia.Driver, root: Path) -> Iterator[dict[str, Any]]:
    libraries = nvidia.library_directory()
    for library in driver.libraries:
        for name in library.names:
            yield _mount(library.host_path, libraries / name, _FILE_OPTIONS)
    for program in driver.programs:
        yield _mount(program, PurePosixPath("/usr/bin") / program.name, _FILE_OPTIONS)
    for socket in driver.sockets:
        yield _mount(socket, PurePosixPath("/") / socket.relative_to(root), _SOCKET_OPTIONS)


def _mount(host_path: Path, container_path: PurePosixPath, options: Sequence[str]) -> dict[str, Any]:
    return {"hostPath": str(host_path), "containerPath": str(container_path), "options": list(options)}
