"""The kernelspecs of environments: plain files that every Jupyter front end reads.

Source: jupyter_client documentation, "Kernel specs".
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlenv import paths
from mlenv.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mlenv.environment import Environment
    from mlenv.lock.model import Lock

_VALID_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_INTERRUPT_MODES = ("signal", "message")
_FIRST_WITH_DEBUGGER = 6

_LOGO = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64">
  <rect x="4" y="4" width="56" height="56" rx="10" fill="#12343b"/>
  <path d="M14 22 32 13l18 9-18 9z" fill="#7bd5c4"/>
  <path d="M14 32l18 9 18-9v6l-18 9-18-9z" fill="#3fa796"/>
  <path d="M14 43l18 9 18-9v5l-18 9-18-9z" fill="#f2b84b"/>
</svg>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledKernel:
    """A kernelspec of ours; `display_name` is what front ends show, `lock` the digest it was written for."""

    name: str
    display_name: str
    environment: str
    lock: str
    path: Path


def kernels_dir() -> Path:
    """Return the directory of the kernelspecs; its parent is what `JUPYTER_PATH` names."""
    return paths.data_dir() / "jupyter" / "kernels"


def install(
    name: str,
    display_name: str,
    *,
    lock: str,
    env: Mapping[str, str] | None = None,
    interrupt_mode: str = "signal",
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write the kernelspec of environment `name` and return its directory.

    `lock` is the digest of the environment's lock. Writing again replaces each file as a whole.
    Raises: KernelError for a name Jupyter does not take or an interrupt mode that does not exist.
    """
    _check(name, interrupt_mode)
    directory = kernels_dir() / name.lower()
    directory.mkdir(parents=True, exist_ok=True)
    document = _document(name, display_name, lock=lock, env=env or {}, interrupt_mode=interrupt_mode)
    document["metadata"].update(metadata or {})
    _write(directory / "logo-svg.svg", _LOGO)
    _write(directory / "kernel.json", json.dumps(document, indent=1, sort_keys=True) + "\n")
    return directory


def install_environment(environment: Environment) -> Path:
    """Write the kernelspec of an environment as its spec and its lock describe it; return its directory."""
    spec, lock = environment.spec, environment.lock
    return install(
        spec.name,
        spec.kernel.display_name or default_display_name(lock),
        lock=lock.digest,
        env=spec.kernel.env,
        interrupt_mode=spec.kernel.interrupt_mode,
        metadata={"debugger": _has_debugger(lock)},
    )


def default_display_name(lock: Lock) -> str:
    """Return what front ends show where the spec says nothing: the name and what it is known by."""
    if lock.pytorch is not None:
        on = f"CUDA {lock.pytorch.cuda}" if lock.pytorch.cuda else "CPU"
        return f"{lock.name} (PyTorch {lock.pytorch.version.partition('+')[0]}, {on})"
    return f"{lock.name} (Python {lock.python.version})" if lock.python else lock.name


def _has_debugger(lock: Lock) -> bool:
    """Return whether the kernel answers debug requests: ipykernel does from version 6 on."""
    versions = [wheel.version for wheel in lock.wheels if wheel.name == "ipykernel"]
    return any(int(version.partition(".")[0]) >= _FIRST_WITH_DEBUGGER for version in versions)


def remove(name: str) -> bool:
    """Remove the kernelspec of an environment; return whether there was one."""
    directory = kernels_dir() / name.lower()
    if not directory.is_dir():
        return False
    (directory / "kernel.json").unlink(missing_ok=True)  # first: without it, Jupyter sees no kernelspec
    shutil.rmtree(directory)
    return True


def installed() -> tuple[InstalledKernel, ...]:
    """Return our kernelspecs, sorted by name."""
    return tuple(_read(file) for file in sorted(kernels_dir().glob("*/kernel.json")))


def _check(name: str, interrupt_mode: str) -> None:
    if not _VALID_NAME.fullmatch(name):
        raise KernelError(
            f"`{name}` cannot be the name of a kernel",
            cause="Jupyter takes letters, digits, `.`, `_` and `-`",
            hint="change `name:` in the spec",
            code="invalid-kernel-name",
        )
    if interrupt_mode not in _INTERRUPT_MODES:
        raise KernelError(
            f"`{interrupt_mode}` is no interrupt mode of a kernel",
            hint="set `interrupt_mode:` to `signal` or `message`",
            code="invalid-interrupt-mode",
        )


def _document(
    name: str, display_name: str, *, lock: str, env: Mapping[str, str], interrupt_mode: str
) -> dict[str, Any]:
    # Front ends that know no provisioners (VS Code) run `argv`; the others never do.
    argv = [sys.executable, "-m", "mlenv.kernel", "launch", name, "-f", "{connection_file}"]
    home = paths.home()
    return {
        "argv": argv,
        "display_name": display_name,
        "language": "python",
        "interrupt_mode": interrupt_mode,
        "env": {**env, **({"MLENV_HOME": str(home)} if home else {})},
        "metadata": {
            "kernel_provisioner": {
                "provisioner_name": "mlenv",
                "config": {"environment": name, "lock": lock},
            },
        },
    }


def _read(file: Path) -> InstalledKernel:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        config = document["metadata"]["kernel_provisioner"]["config"]
        return InstalledKernel(
            name=file.parent.name,
            display_name=document["display_name"],
            environment=config["environment"],
            lock=config["lock"],
            path=file.parent,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(
            f"kernelspec `{file}` is damaged",
            cause=f"{type(error).__name__}: {error}",
            hint=f"mlenv kernel install {file.parent.name}",
            code="damaged-kernelspec",
        ) from error


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
