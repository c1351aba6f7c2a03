"""Standalone CPython builds, as uv knows them: for a Python that no base has."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from mlenv.errors import ResolveError
from mlenv.lock.model import PythonLock
from mlenv.resolve import tags, uv
from mlenv.resolve.indexes import Indexes, host_indexes
from mlenv.resolve.versions import Wanted, numbers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PREFIX = "/opt/python"
"""Where a standalone Python lies in the image."""


def standalone(
    wanted: Wanted, minor: str, *, architecture: str, indexes: Indexes | None = None
) -> PythonLock:
    """Return the newest standalone CPython of `minor` that the spec allows, pinned by uv's key.

    The list is part of uv: nothing is asked over the network, and uv checks the archive against the sha256 it
    carries when it fetches it. Raises: ResolveError where uv knows none.
    """
    builds = _builds(minor, indexes or host_indexes())
    fitting = [row for row in builds if _fits(row, wanted, architecture)]
    if not fitting:
        known = sorted(
            {str(row["version"]) for row in builds if row["implementation"] == "cpython"}, key=numbers
        )
        raise ResolveError(
            f"there is no Python {wanted.text or minor} to install",
            cause=f"no base has it, and the standalone builds that uv knows are {', '.join(known) or 'none'}",
            hint=f'set `python: "{minor}"`',
            code="no-python",
        )
    best = max(fitting, key=lambda row: numbers(str(row["version"])))
    return PythonLock(
        version=str(best["version"]),
        source="standalone",
        interpreter=f"{PREFIX}/bin/python{minor}",
        key=str(best["key"]),
    )


def fetch(python: PythonLock, directory: Path, *, indexes: Indexes | None = None) -> Path:
    """Have uv fetch and check the archive of a standalone CPython; return its path below `directory`.

    Raises: ResolveError where it cannot be fetched.
    """
    host = indexes or host_indexes()
    cache = directory / "archive"
    settings = replace(host, environment={**host.environment, "UV_PYTHON_CACHE_DIR": str(cache)})
    installed = directory / "installed"
    command = ["python", "install", str(python.key), "--no-bin", "--install-dir", str(installed)]
    try:
        with uv.workspace() as workspace:
            uv.run_uv(command, indexes=settings, directory=workspace)
    except uv.UvError as failure:
        raise ResolveError(
            f"Python {python.version} could not be fetched",
            cause=uv.sentences(failure.said),
            hint="set UV_PYTHON_INSTALL_MIRROR to a mirror of python-build-standalone",
            code="python-unreachable",
        ) from failure
    shutil.rmtree(installed)
    return next(path for path in cache.rglob("*.tar.*") if path.is_file())


def _builds(minor: str, indexes: Indexes) -> list[Mapping[str, object]]:
    command = ["python", "list", minor, "--all-versions", "--only-downloads", "--output-format", "json"]
    try:
        with uv.workspace() as directory:
            builds: list[Mapping[str, object]] = json.loads(
                uv.run_uv(command, indexes=indexes, directory=directory)
            )
    except uv.UvError as failure:
        raise ResolveError(
            "uv could not list its Python builds", cause=uv.sentences(failure.said), code="uv-failed"
        ) from failure
    return builds


def _fits(row: Mapping[str, object], wanted: Wanted, architecture: str) -> bool:
    kind = (row["implementation"], row["variant"], row["os"], row["libc"], row["arch"])
    version = str(row["version"])
    plain = version.replace(".", "").isdigit()  # no pre-release
    return (
        kind == ("cpython", "default", "linux", "gnu", tags.machine(architecture))
        and plain
        and wanted.allows(version)
    )
