"""A host with an NVIDIA driver, laid out in a directory: two GPUs, minors 0 and 3, the second partitioned."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

VERSION = "535.183.01"
STALE = "470.42.01"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
FIRST = "GPU-aaaaaaaa-0000-0000-0000-000000000001"
SECOND = "GPU-bbbbbbbb-0000-0000-0000-000000000002"


def elf(soname: str) -> bytes:
    """Return a library that holds its DT_SONAME and nothing else; addresses are offsets plus 0x1000."""
    strings = b"\0" + soname.encode() + b"\0"
    dynamic = struct.pack("<qQqQqQ", 5, 0x1000 + 176, 14, 1, 0, 0)
    fields = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + fields
    size = 64 + 2 * 56 + len(strings) + len(dynamic)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x1000, 0x1000, size, size, 4096)
    where = 176 + len(strings)
    segment = struct.pack(
        "<IIQQQQQQ", 2, 6, where, 0x1000 + where, 0x1000 + where, len(dynamic), len(dynamic), 8
    )
    return header + load + segment + strings + dynamic


def write(path: Path, content: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make(root: Path) -> Path:
    """Lay the host out below `root`; its device files are plain files, whose numbers a test does not need."""
    version = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {VERSION}  Sun May 12 19:39:15 UTC 2024\n"
    write(root / "proc/driver/nvidia/version", version + "GCC version:  gcc version 12.2.0\n")
    for bus, uuid, minor in (("0000:01:00.0", FIRST, 0), ("0000:41:00.0", SECOND, 3)):
        facts = f"Model: \t\t NVIDIA A100\nGPU UUID: \t {uuid}\nBus Location: \t {bus}\n"
        facts += f"Device Minor: \t {minor}\n"
        write(root / "proc/driver/nvidia/gpus" / bus / "information", facts)
    capabilities = "config 1\ngpu0/gi1/access 3\ngpu3/gi1/access 12\ngpu3/gi1/ci0/access 13\n"
    write(root / "proc/driver/nvidia-caps/mig-minors", capabilities)
    for name in (
        "nvidiactl",
        "nvidia-uvm",
        "nvidia-uvm-tools",
        "nvidia0",
        "nvidia3",
        "nvidia-caps/nvidia-cap12",
        "nvidia-caps/nvidia-cap13",
    ):
        write(root / "dev" / name)
    libraries = root / LIBRARIES
    for name, soname in (
        ("cuda", "libcuda.so.1"),
        ("nvidia-ml", "libnvidia-ml.so.1"),
        ("nvidia-nvvm", "libnvidia-nvvm.so.4"),
    ):
        write(libraries / f"lib{name}.so.{VERSION}", elf(soname))
    write(libraries / f"libcuda.so.{STALE}", elf("libcuda.so.1"))
    write(libraries / f"libnvidia-glcore.so.{VERSION}", elf(f"libnvidia-glcore.so.{VERSION}"))
    write(root / "usr/bin/nvidia-smi", "#!/bin/sh\n").chmod(0o755)
    return root


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def nvml(*, failure: int | None = None) -> SimpleNamespace:
    """Return nvidia-ml-py's ten functions over the tree's GPUs; `failure` is what nvmlInit answers."""
    rows = [(FIRST, 0, "00000000:01:00.0", 0), (SECOND, 3, "00000000:41:00.0", 1)]

    def start() -> None:
        if failure is not None:
            raise NVMLError(failure)

    def mig_mode(row: tuple) -> list[int]:
        if row[3] == 0:
            raise NVMLError(3)  # NVML_ERROR_NOT_SUPPORTED
        return [1, 1]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(rows),
        nvmlDeviceGetHandleByIndex=lambda index: rows[index],
        nvmlDeviceGetUUID=lambda row: row[0].encode(),
        nvmlDeviceGetMinorNumber=lambda row: row[1],
        nvmlDeviceGetPciInfo=lambda row: SimpleNamespace(busId=row[2].encode()),
        nvmlDeviceGetName=lambda _: "NVIDIA A100-SXM4-80GB",
        nvmlDeviceGetMemoryInfo=lambda row: SimpleNamespace(total=80 << 30 if row[1] else 40 << 30),
        nvmlDeviceGetCudaComputeCapability=lambda _: (8, 0),
        nvmlDeviceGetMigMode=mig_mode,
    )
