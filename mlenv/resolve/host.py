"""Facts about this machine that a resolution depends on: architecture, C library, NVIDIA driver and GPUs.

The GPUs are read without loading a driver library into this process: `nvidia-smi` answers when it is there,
the driver's files under /proc otherwise.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""uname's machine to the architecture as OCI and Debian spell it."""

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
_QUERY = ("uuid", "name", "compute_cap", "memory.total", "driver_version")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU; `compute_capability` like "8.6", None where only the model is known; `memory` in bytes."""

    name: str
    uuid: str | None = None
    compute_capability: str | None = None
    memory: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """This machine: `architecture` as OCI spells it, `glibc` "2.36", the NVIDIA `driver` "535.104.05"."""

    architecture: str
    glibc: str | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()


def facts() -> Host:
    """Return what is true of this machine; a process is started only where an NVIDIA driver is loaded."""
    machine = platform.machine()
    driver, gpus = _nvidia()
    return Host(architecture=ARCHITECTURES.get(machine, machine), glibc=_glibc(), driver=driver, gpus=gpus)


def _glibc() -> str | None:
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):  # another C library has no such name: confstr(3)
        return None
    return library.removeprefix("glibc ") or None


def _nvidia() -> tuple[str | None, tuple[Gpu, ...]]:
    loaded = _DRIVER_VERSION.exists() or Path("/dev/dxg").exists()  # dxg is WSL's way to the Windows driver
    if not loaded:
        return None, ()
    return _ask_smi() or _read_proc()


def _ask_smi() -> tuple[str, tuple[Gpu, ...]] | None:
    """Return the driver and GPUs as `nvidia-smi` tells them, or None where it cannot be asked."""
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/lib/wsl/lib"))
    command = ["nvidia-smi", "--query-gpu=" + ",".join(_QUERY), "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env={**os.environ, "PATH": search},
        )
    except (OSError, subprocess.SubprocessError):
        return None  # not installed, or older than the fields asked for: /proc knows the rest
    return parse_smi(answer.stdout)


def parse_smi(text: str) -> tuple[str, tuple[Gpu, ...]] | None:
    """Return driver and GPUs from `nvidia-smi`'s CSV, or None where it lists none."""
    rows = [
        [field.strip() for field in row] for row in csv.reader(text.splitlines()) if len(row) == len(_QUERY)
    ]
    gpus = tuple(
        Gpu(
            uuid=uuid,
            name=name,
            compute_capability=capability if re.fullmatch(r"\d+\.\d+", capability) else None,
            memory=int(mebibytes) << 20 if mebibytes.isdigit() else None,
        )
        for uuid, name, capability, mebibytes, _ in rows
    )
    return (rows[0][4], gpus) if rows else None


def _read_proc() -> tuple[str | None, tuple[Gpu, ...]]:
    version = _DRIVER_VERSION.read_text() if _DRIVER_VERSION.exists() else ""
    folders = sorted(_DRIVER_GPUS.iterdir()) if _DRIVER_GPUS.is_dir() else []
    return parse_driver_version(version), tuple(
        parse_gpu_information((folder / "information").read_text()) for folder in folders
    )


def parse_driver_version(text: str) -> str | None:
    """Return the driver's version from /proc/driver/nvidia/version ("NVRM version: … 535.104.05 …")."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found.group(1) if found else None


def parse_gpu_information(text: str) -> Gpu:
    """Return the GPU that a /proc/driver/nvidia/gpus/*/information file describes."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return Gpu(
        name=fields.get("Model", "").strip() or "unknown NVIDIA GPU", uuid=fields.get("GPU UUID", "").strip()
    )
