"""Packages that lie beside a spec: a source folder, built into a wheel, or a wheel file taken as it is.

The build runs on a copy, with uv and the host's interpreter, so only pure Python comes out right; anything
else is refused.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from packaging.utils import parse_wheel_filename

from mlenv import paths
from mlenv.errors import PackageNotFoundError, ResolveError
from mlenv.resolve.uv import UvError, run_uv, sentences, workspace
from mlenv.spec.inputs import is_local, local_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mlenv.resolve.indexes import Indexes

_EPOCH = "315532800"
"""1980-01-01, the first time a zip file can hold (reproducible-builds.org, SOURCE_DATE_EPOCH)."""

_NOT_SOURCE = (
    ".git",
    ".hg",
    ".venv",
    "venv",
    "__pycache__",
    "build",
    "dist",
    "*.egg-info",
    ".tox",
    ".mypy_cache",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalPackage:
    """One local package: `text` is its place as the spec writes it, `extras` like "[dev]"."""

    text: str
    source: Path
    extras: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltWheel:
    """The wheel of a local package, kept in the cache by its sha256; `size` in bytes."""

    text: str
    extras: str
    name: str
    version: str
    file: Path
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """Return it as a requirement that uv reads."""
        return f"{self.name}{self.extras} @ {self.file.as_uri()}"


def split(packages: Sequence[str], directory: Path) -> tuple[list[str], list[LocalPackage]]:
    """Part the requirements of a spec in `directory` into those for the indexes and the local ones.

    Raises: PackageNotFoundError where a local one is not there.
    """
    remote: list[str] = []
    local: list[LocalPackage] = []
    for text in packages:
        if is_local(text):
            local.append(_local(text, directory))
        else:
            remote.append(text)
    return remote, local


def _local(text: str, directory: Path) -> LocalPackage:
    place = local_path(text)
    source = directory / place
    if not source.exists():
        raise PackageNotFoundError(
            f"the local package `{place}` is not there",
            cause=f"`{source}` does not exist",
            hint="paths in `packages` are relative to the spec's folder",
        )
    return LocalPackage(text=place, source=source.resolve(), extras=text.removeprefix(place))


def build(package: LocalPackage, indexes: Indexes) -> BuiltWheel:
    """Return the wheel of a local package; the same source gives the same bytes.

    Raises: ResolveError where it cannot be built or holds compiled code.
    """
    if package.source.suffix == ".whl":
        return _kept(package.source, package)
    reproducible = replace(indexes, environment={**indexes.environment, "SOURCE_DATE_EPOCH": _EPOCH})
    with workspace() as directory:
        copy, out = directory / "source", directory / "wheel"
        shutil.copytree(package.source, copy, ignore=shutil.ignore_patterns(*_NOT_SOURCE), symlinks=True)
        command = ["build", "--wheel", "--python", sys.executable, "--out-dir", str(out), str(copy)]
        try:
            run_uv(command, indexes=reproducible, directory=directory)
        except UvError as failure:
            raise ResolveError(
                f"the local package `{package.text}` cannot be built",
                cause=sentences(failure.said).replace(str(copy), str(package.source)),
                hint=f"`uv build --wheel {package.source}` shows the whole log",
                code="local-build-failed",
            ) from failure
        wheel = _pure(next(out.glob("*.whl")), package)
        return _kept(wheel, package)


def _pure(wheel: Path, package: LocalPackage) -> Path:
    tags = parse_wheel_filename(wheel.name)[3]
    if all(tag.abi == "none" and tag.platform == "any" for tag in tags):
        return wheel
    raise ResolveError(
        f"the local package `{package.text}` holds compiled code",
        cause=f"its wheel is `{wheel.name}`, built for this machine and not for the environment's Python",
        hint="build a wheel for the environment's Python and name that file in `packages`",
        code="local-not-pure",
    )


def _kept(wheel: Path, package: LocalPackage) -> BuiltWheel:
    """Copy a wheel into the cache under its digest and describe it."""
    content = wheel.read_bytes()
    digest = sha256(content).hexdigest()
    kept = paths.cache_dir() / "wheels" / digest / wheel.name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(kept)
    name, version, _, _ = parse_wheel_filename(wheel.name)
    return BuiltWheel(
        text=package.text,
        extras=package.extras,
        name=str(name),
        version=str(version),
        file=kept,
        sha256=digest,
        size=len(content),
    )
