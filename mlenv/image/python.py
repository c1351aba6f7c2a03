"""Interpreters: a standalone CPython where no base has the version, and the empty environment over either.

Source: PEP 405 (pyvenv.cfg); python-build-standalone, docs/distributions.rst (`install_only` archives).
"""

from __future__ import annotations

import gzip
import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from mlenv.image.digest import canonical_json, digest_of
from mlenv.image.unpack import unpack_layer
from mlenv.image.wheel import MTIME_ORIGIN, PREFIX

if TYPE_CHECKING:
    from pathlib import Path

    from mlenv.lock.model import PythonLock

VERSION = 1
"""Version of what these trees look like; part of their keys."""

STANDALONE = "/opt/python"
"""Where a standalone interpreter lies in the container."""


def python_key(python: PythonLock) -> str:
    """Return the key of a standalone interpreter's tree."""
    return digest_of(canonical_json({"python": VERSION, "build": python.key, "archive": python.sha256}))


def skeleton_key(python: PythonLock) -> str:
    """Return the key of the empty environment over an interpreter."""
    parts = {
        "skeleton": VERSION,
        "version": python.version,
        "interpreter": python.interpreter,
        "prefix": PREFIX,
    }
    return digest_of(canonical_json(parts))


def build_python(archive: Path, root: Path) -> None:
    """Unpack an `install_only` archive below `root` at `/opt/python`, without bytecode."""
    root.mkdir()
    with gzip.open(archive) as tar:
        unpack_layer(tar.read, root, rename=_place)


def _place(path: str) -> str:
    first, _, rest = path.partition("/")
    if first != "python" or "__pycache__" in rest.split("/"):
        return ""
    return f"{STANDALONE[1:]}/{rest}" if rest else STANDALONE[1:]


def build_skeleton(python: PythonLock, root: Path) -> None:
    """Make an environment without packages at `/opt/env` below `root`, like `venv --without-pip`."""
    minor = ".".join(python.version.split(".")[:2])
    prefix = root / PREFIX[1:]
    for name in ("bin", "include", f"lib/python{minor}/site-packages"):
        (prefix / name).mkdir(parents=True)
    (prefix / "lib64").symlink_to("lib")
    interpreter = PurePosixPath(python.interpreter)
    (prefix / "pyvenv.cfg").write_text(
        f"home = {interpreter.parent}\ninclude-system-site-packages = false\nversion = {python.version}\n"
    )
    (prefix / f"bin/python{minor}").symlink_to(interpreter)
    for name in ("python", "python3"):
        (prefix / "bin" / name).symlink_to(f"python{minor}")
    for directory, names, files in os.walk(root, topdown=False):
        for name in (*names, *files, "."):
            os.utime(f"{directory}/{name}", (MTIME_ORIGIN, MTIME_ORIGIN), follow_symlinks=False)
