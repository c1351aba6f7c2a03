"""NVIDIA GPUs of this host and the files of their driver, found without NVIDIA's container toolkit.

The kernel driver says its version; everything of user space must be of exactly that version, so libraries
are looked up by `lib*.so.VERSION` in the directory that holds libcuda of that version, and a stale copy
beside it is passed over. GPUs come from NVML, which alone knows memory and compute capability; without
NVML, from /proc/driver/nvidia.

Functions take the host's `root`, so that a test can lay out another machine. With another root than `/`
NVML is not asked unless it is given.

Source: NVIDIA/libnvidia-container src/nvc_info.c (lists by capability), NVIDIA/nvidia-container-toolkit,
NVIDIA driver README chapter 5 (device files), NVML API reference.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mlenv.errors import ContainerError, GpuNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LIBRARIES = {
    "utility": ("nvidia-ml", "nvidia-cfg", "nvidia-nscq"),
    "compute": (
        "cuda",
        "cudadebugger",
        "nvidia-opencl",
        "nvidia-gpucomp",
        "nvidia-ptxjitcompiler",
        "nvidia-fatbinaryloader",
        "nvidia-allocator",
        "nvidia-compiler",
        "nvidia-pkcs11",
        "nvidia-pkcs11-openssl3",
        "nvidia-nvvm",
        "nvidia-nvvm70",
        "nvidia-tileiras",
    ),
}
"""Driver libraries by capability, without `lib` and `.so.VERSION`."""

PROGRAMS = {
    "utility": ("nvidia-smi", "nvidia-debugdump", "nvidia-persistenced"),
    "compute": ("nvidia-cuda-mps-control", "nvidia-cuda-mps-server"),
}

CAPABILITIES = ("compute", "utility")
"""What a container gets: NVIDIA's own default."""

SOCKETS = ("run/nvidia-persistenced/socket",)

_LIBRARY_DIRECTORIES = (
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/lib/x86_64-linux-gnu/nvidia/current",
    "usr/lib/aarch64-linux-gnu/nvidia/current",
    "usr/local/nvidia/lib64",
    "run/opengl-driver/lib",
    "usr/lib/wsl/lib",
)
_PROGRAM_DIRECTORIES = ("usr/bin", "usr/local/nvidia/bin", "run/current-system/sw/bin")
_CONTROL_NODES = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
_ROOT = Path("/")
_MISMATCH = 18
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_STRTAB, _DT_SONAME = 5, 14
_VERSION = re.compile(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU. `minor` numbers its device file and need not be its `index`; `memory` is in bytes."""

    index: int
    minor: int
    uuid: str
    bus_id: str
    name: str
    memory: int | None = None
    compute_capability: str | None = None
    mig: bool = False

    def __str__(self) -> str:
        """Return the GPU as errors list it."""
        return f"{self.index}: {self.name} ({self.uuid})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A library of the driver and the names that programs load it by."""

    host_path: Path
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Driver:
    """The driver of this host: its version and its files."""

    version: str
    libraries: tuple[Library, ...]
    programs: tuple[Path, ...]
    sockets: tuple[Path, ...]


# --- the driver


def driver_version(root: Path = _ROOT) -> str | None:
    """Return the version of the driver the kernel runs, or None where it runs none."""
    for name in ("proc/driver/nvidia/version", "sys/module/nvidia/version"):
        try:
            text = (root / name).read_text()
        except FileNotFoundError:
            continue
        found = _VERSION.search(text) or re.fullmatch(r"(\d+(?:\.\d+)+)\s*", text)
        if found:
            return found[1]
    return None


def find_driver(version: str, root: Path = _ROOT, *, capabilities: Iterable[str] = CAPABILITIES) -> Driver:
    """Return the files that a container needs of the driver.

    Raises: ContainerError where user space has no libcuda of the kernel's version.
    """
    wanted = tuple(capabilities)
    directory = _library_directory(version, root)
    libraries = (directory / f"lib{name}.so.{version}" for kind in wanted for name in LIBRARIES[kind])
    return Driver(
        version=version,
        libraries=tuple(_library(path) for path in libraries if path.is_file()),
        programs=tuple(_programs(wanted, root)),
        sockets=tuple(root / name for name in SOCKETS if (root / name).exists()),
    )


def _library_directory(version: str, root: Path) -> Path:
    for name in _LIBRARY_DIRECTORIES:
        if (root / name / f"libcuda.so.{version}").is_file():
            return root / name
    raise ContainerError(
        f"the NVIDIA driver's libraries of version {version} are missing",
        cause=f"the kernel runs driver {version}, and no `libcuda.so.{version}` lies where libraries do",
        hint="reboot after a driver update, or install the driver's libraries; `gpus: none` goes without",
        code="driver-incomplete",
    )


def _library(path: Path) -> Library:
    names = {path.name, soname(path) or path.name}
    if path.name.startswith("libcuda.so"):
        names.add("libcuda.so")
    return Library(host_path=path, names=tuple(sorted(names)))


def _programs(capabilities: Sequence[str], root: Path) -> Iterator[Path]:
    for name in (name for kind in capabilities for name in PROGRAMS[kind]):
        found = (root / directory / name for directory in _PROGRAM_DIRECTORIES)
        yield from [path for path in found if path.is_file()][:1]


def soname(path: Path) -> str | None:
    """Return the name a library is loaded by, from its ELF dynamic section. Source: elf(5), DT_SONAME."""
    with path.open("rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian: what NVIDIA's Linux drivers are
            return None
        offset, count = struct.unpack_from("<Q", header, 0x20)[0], struct.unpack_from("<H", header, 0x38)[0]
        file.seek(offset)
        segments = [struct.unpack("<IIQQQQQQ", file.read(56)) for _ in range(count)]
        dynamic = next((segment for segment in segments if segment[0] == _PT_DYNAMIC), None)
        if dynamic is None:
            return None
        file.seek(dynamic[2])
        values = dict(struct.iter_unpack("<qQ", file.read(dynamic[5] & ~15)))
        if _DT_SONAME not in values or _DT_STRTAB not in values:
            return None
        file.seek(_file_offset(segments, values[_DT_STRTAB]) + values[_DT_SONAME])
        return file.read(256).partition(b"\0")[0].decode()


def _file_offset(segments: Iterable[tuple[int, ...]], address: int) -> int:
    for kind, _, offset, start, _, size, _, _ in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    return address


# --- the GPUs


def gpus(root: Path = _ROOT, *, nvml: Any = None) -> tuple[Gpu, ...]:
    """Return this host's GPUs, in the order of their PCI addresses, as nvidia-smi numbers them.

    `nvml`: a module of nvidia-ml-py's shape, for a host laid out elsewhere.

    Raises: ContainerError where library and kernel driver are of different versions.
    """
    library = nvml if nvml is not None or root != _ROOT else _nvml()
    if library is None:
        return tuple(_gpus_of_proc(root))
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        if getattr(error, "value", None) == _MISMATCH:
            raise _mismatch(root) from error
        return tuple(_gpus_of_proc(root))
    try:
        return tuple(_gpu_of_nvml(library, index) for index in range(library.nvmlDeviceGetCount()))
    finally:
        library.nvmlShutdown()


def _nvml() -> Any:
    """Return nvidia-ml-py's module, which takes long to import: only where the kernel runs the driver."""
    if driver_version() is None:
        return None
    import pynvml  # type: ignore[import-untyped]

    return pynvml


def _mismatch(root: Path) -> ContainerError:
    return ContainerError(
        "the NVIDIA driver was updated but not loaded",
        cause=f"the kernel runs driver {driver_version(root)} and its libraries are of another version",
        hint="reboot, or reload the nvidia kernel modules; `gpus: none` goes without",
        code="driver-mismatch",
    )


def _gpu_of_nvml(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        index=index,
        minor=nvml.nvmlDeviceGetMinorNumber(handle),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        bus_id=_text(nvml.nvmlDeviceGetPciInfo(handle).busId).lower(),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory=nvml.nvmlDeviceGetMemoryInfo(handle).total,
        compute_capability=f"{major}.{minor}",
        mig=_mig_enabled(nvml, handle),
    )


def _mig_enabled(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:  # a GPU that cannot be partitioned says NOT_SUPPORTED
        return False


def _text(value: str | bytes) -> str:
    """Return a string of NVML, which was bytes before nvidia-ml-py 11.5."""
    return value.decode() if isinstance(value, bytes) else value


def _gpus_of_proc(root: Path) -> Iterator[Gpu]:
    folder = root / "proc/driver/nvidia/gpus"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    for index, path in enumerate(found):
        lines = (line.partition(":") for line in (path / "information").read_text().splitlines())
        facts = {key.strip(): value.strip() for key, _, value in lines}
        yield Gpu(
            index=index,
            minor=int(facts.get("Device Minor", index)),
            uuid=facts.get("GPU UUID", ""),
            bus_id=path.name.lower(),
            name=facts.get("Model", "NVIDIA GPU"),
        )


# --- choosing


def select(
    available: Sequence[Gpu],
    *,
    mode: str = "auto",
    count: int | None = None,
    ids: Iterable[str] = (),
    memory: int | None = None,
) -> tuple[Gpu, ...]:
    """Return the GPUs that a selection means.

    `mode`: auto (all there are, or none), all, none, count, ids. An id is an index, a UUID or the only
    beginning of one, or a PCI address. `memory`: bytes that each GPU must have at least.

    Raises: GpuNotFoundError listing what there is.
    """
    fitting = [gpu for gpu in available if memory is None or (gpu.memory or 0) >= memory]
    if mode == "none":
        return ()
    if mode == "ids":
        return tuple(dict.fromkeys(_by_id(available, wanted) for wanted in ids))
    if mode == "count":
        return tuple(_first(fitting, available, 1 if count is None else count, memory))
    if mode == "all" and not fitting:
        raise _not_found("all GPUs are asked for and there is none", available)
    return tuple(fitting)


def _first(fitting: Sequence[Gpu], available: Sequence[Gpu], count: int, memory: int | None) -> Sequence[Gpu]:
    if len(fitting) < count:
        size = f" with {memory} bytes of memory" if memory else ""
        raise _not_found(f"{count} GPUs{size} are asked for and there are {len(fitting)}", available)
    return fitting[:count]


def _by_id(available: Sequence[Gpu], wanted: str) -> Gpu:
    text = str(wanted).lower()
    exact = [gpu for gpu in available if text in (str(gpu.index), gpu.uuid.lower(), gpu.bus_id)]
    if exact:
        return exact[0]
    near = [] if text.isdigit() else [gpu for gpu in available if _begins(gpu, text)]
    if len(near) == 1:
        return near[0]
    why = f"`{wanted}` is the beginning of several GPUs' names" if near else f"there is no GPU `{wanted}`"
    raise _not_found(why, available)


def _begins(gpu: Gpu, text: str) -> bool:
    uuid = gpu.uuid.lower()
    return uuid.startswith((text, f"gpu-{text}")) or gpu.bus_id.endswith(f":{text}")


def _not_found(message: str, available: Sequence[Gpu]) -> GpuNotFoundError:
    return GpuNotFoundError(
        message,
        cause="this host has " + ("; ".join(map(str, available)) or "no NVIDIA GPU that its driver shows"),
        hint="`nvidia-smi -L` lists them; `gpus: auto` takes what there is",
    )


# --- device files


def control_nodes(root: Path = _ROOT) -> tuple[Path, ...]:
    """Return the device files that every GPU program opens."""
    return tuple(root / "dev" / name for name in _CONTROL_NODES if (root / "dev" / name).exists())


def gpu_nodes(gpu: Gpu, root: Path = _ROOT) -> tuple[Path, ...]:
    """Return the device files of one GPU; of a partitioned one, those of all its instances too."""
    nodes = [root / "dev" / f"nvidia{gpu.minor}"]
    if gpu.mig:
        nodes += [root / f"dev/nvidia-caps/nvidia-cap{number}" for number in _mig_minors(gpu, root)]
    return tuple(nodes)


def _mig_minors(gpu: Gpu, root: Path) -> Iterator[int]:
    """Yield the numbers of the capability files of a GPU's instances; lines read `gpu0/gi1/ci0/access 13`."""
    path = root / "proc/driver/nvidia-caps/mig-minors"
    for line in path.read_text().splitlines() if path.is_file() else ():
        name, _, number = line.partition(" ")
        if name.startswith(f"gpu{gpu.minor}/"):
            yield int(number)


def library_directory(machine: str = os.uname().machine) -> PurePosixPath:
    """Return where a Debian image looks for libraries."""
    return PurePosixPath(f"/usr/lib/{machine}-linux-gnu")
