"""Resolve Python packages to wheels for a target, and find where the wheels of a lock can be fetched.

uv solves; one wheel per package is picked for the target's tags and pinned by its sha256. Addresses are not
part of a lock: they are remembered in the cache when resolving, and asked of uv again where the cache does
not know them.
"""

from __future__ import annotations

import base64
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name

from mlenv import paths
from mlenv.errors import IndexUnreachableError, PackageNotFoundError, ResolveError
from mlenv.lock.model import Lock, Wheel
from mlenv.resolve import local, tags, uv
from mlenv.resolve.indexes import Indexes, host_indexes, parse_toml, redacted, with_credentials

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlenv.resolve.choice import Build


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What wheels are for: the full Python version ("3.11.2"), the architecture as OCI spells it, glibc."""

    python: str
    architecture: str
    glibc: str

    @property
    def platform(self) -> str:
        """Return the platform as uv names it."""
        return tags.uv_platform(self.architecture, self.glibc)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be resolved: requirements, constraints, requirement files and built local packages."""

    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    local: tuple[local.BuiltWheel, ...] = ()


# --- resolving


def torch_requirements(build: Build) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the requirements and the constraints that pin a PyTorch build and what belongs to it.

    `===` keeps a local version, which sorts above the plain one, from standing in for PyPI's own build.
    torchaudio's builds had no local version before PyTorch 1.10 and pin torch themselves, so only its release
    is constrained.
    """
    release = build.release
    _, _, local_part = build.local_version.partition("+")
    suffix = f"+{local_part}" if local_part else ""
    constraints = list(release.pins)
    if release.torchvision:
        constraints.append(f"torchvision==={release.torchvision}{suffix}")
    if release.torchaudio:
        constraints.append(f"torchaudio=={release.torchaudio}")
    return (f"torch==={build.local_version}",), tuple(constraints)


def resolve_wheels(
    wanted: Wanted, *, target: Target, build: Build | None, indexes: Indexes | None = None
) -> tuple[Wheel, ...]:
    """Return the wheels that satisfy `wanted`, sorted by name, and remember where they are.

    With a PyTorch `build` other than PyPI's default the host's own indexes are tried first, then the PyTorch
    wheel index that uv knows. Raises: ResolveError and its kinds, with uv's explanation as the cause.
    """
    indexes = indexes or host_indexes()
    pylock = _compile(wanted, target, build, indexes)
    ranks = tags.supported(target.python, target.architecture, target.glibc)
    local_sources = {str(canonicalize_name(wheel.name)): wheel for wheel in wanted.local}
    wheels = [_pin(package, ranks, local_sources, indexes) for package in pylock]
    if build is not None:
        _verify_torch(wheels, build)
    return tuple(sorted(wheels, key=lambda wheel: (wheel.name, wheel.version)))


def _compile(wanted: Wanted, target: Target, build: Build | None, indexes: Indexes) -> list[dict[str, Any]]:
    try:
        return _run(wanted, target, indexes, backend=None)
    except uv.UvError as failure:
        if build is None or not _lacks_build(failure, build):
            raise _explained(failure, target, indexes) from failure
        first = failure
    try:
        return _run(wanted, target, indexes, backend=build.variant.tag)
    except uv.UvError as failure:
        error = uv.explain(failure, python=target.python, platform=target.platform)
        if isinstance(error, IndexUnreachableError):
            raise _torch_index_error(error, build, first) from failure
        raise error from failure


def _lacks_build(failure: uv.UvError, build: Build) -> bool:
    """Say whether uv failed because the host's indexes lack a build that is not PyPI's default."""
    said = uv.sentences(failure.said)
    _, _, local_part = build.local_version.partition("+")
    return bool(local_part) and any(
        f"{name}=={version}+{local_part}" in said.replace("===", "==")
        for name, version in (("torch", build.release.version), ("torchvision", build.release.torchvision))
    )


def _torch_index_error(
    error: IndexUnreachableError, build: Build, first: uv.UvError
) -> IndexUnreachableError:
    default = build.release.variants[build.release.default]
    elsewhere = uv.sentences(first.said).splitlines()[-1]
    return IndexUnreachableError(
        f"the PyTorch wheel index cannot be reached: torch {build.local_version} is only there",
        cause=f"{error.cause}\nthe indexes configured on this host do not have it: {elsewhere}",
        hint="let this machine reach the PyTorch wheel index, put the wheel into a `find-links` folder "
        f'of pip, or take the build that PyPI has: `cuda: "{default.cuda}"`',
        code="pytorch-index-unreachable",
    )


def _run(
    wanted: Wanted, target: Target, indexes: Indexes, *, backend: str | None, dependencies: bool = True
) -> list[dict[str, Any]]:
    """Return the packages of the pylock that uv compiles. Source: PEP 751."""
    with uv.workspace() as directory:
        requirements, constraints = directory / "requirements.in", directory / "constraints.txt"
        lines = [*wanted.requirements, *(wheel.requirement for wheel in wanted.local)]
        requirements.write_text("".join(f"{line}\n" for line in lines))
        constraints.write_text("".join(f"{line}\n" for line in wanted.constraints))
        command = [
            *("pip", "compile", str(requirements), *map(str, wanted.files)),
            *("--constraints", str(constraints)),
            *("--python", sys.executable, "--no-python-downloads"),
            *("--python-version", target.python, "--python-platform", target.platform),
            *("--only-binary", ":all:", "--generate-hashes", "--format", "pylock.toml", "--no-header"),
            *(("--torch-backend", backend) if backend else ()),
            *(() if dependencies else ("--no-deps",)),
            *indexes.arguments,
        ]
        pylock = uv.run_uv(command, indexes=indexes, directory=directory)
    packages: list[dict[str, Any]] = parse_toml(pylock).get("packages", [])
    return packages


def _explained(failure: uv.UvError, target: Target, indexes: Indexes) -> ResolveError:
    """Return uv's failure as an error; where an exact version is missing, with the versions near it."""
    error = uv.explain(failure, python=target.python, platform=target.platform)
    pin = uv.missing_pin(failure)
    if isinstance(error, PackageNotFoundError) and pin and error.hint is None:
        name, version = pin
        near = _near_versions(name, version, target, indexes)
        error.hint = (
            f"the nearest versions for this Python are {', '.join(near)}"
            if near
            else "no version fits this Python"
        )
    return error


def _near_versions(name: str, version: str, target: Target, indexes: Indexes) -> list[str]:
    """Return the version below `version`, the one above and the newest, as far as they exist."""
    found: list[str] = []
    asks = ((f"{name}<{version}", ()), (f"{name}>{version}", ("--resolution", "lowest")), (name, ()))
    for requirement, extra in asks:
        wanted = Wanted(requirements=(requirement,))
        try:
            packages = _run(
                wanted,
                target,
                Indexes(
                    environment=indexes.environment, arguments=(*indexes.arguments, *extra), urls=indexes.urls
                ),
                backend=None,
                dependencies=False,
            )
        except uv.UvError:
            continue  # there is none on that side
        found += [package["version"] for package in packages if package["version"] not in found]
    return found


def _verify_torch(wheels: Iterable[Wheel], build: Build) -> None:
    got = next((wheel.version for wheel in wheels if wheel.name == "torch"), "none")
    if got != build.local_version:
        raise ResolveError(
            f"uv chose torch {got} where {build.local_version} was asked for",
            cause="a package index or a find-links folder of this host answers with another build",
            hint="look at `pip config list` and uv's configuration for indexes that replace PyPI's torch",
            code="wrong-torch-build",
        )


# --- from a pylock to one wheel per package


def _pin(
    package: Mapping[str, Any],
    ranks: Mapping[Any, int],
    local_sources: Mapping[str, local.BuiltWheel],
    indexes: Indexes,
) -> Wheel:
    name = str(canonicalize_name(package["name"]))
    own = local_sources.get(name)
    if own is not None:
        _remember(own.sha256, own.file.as_uri())
        return Wheel(
            name=name,
            version=own.version,
            filename=own.file.name,
            sha256=own.sha256,
            size=own.size,
            path=own.text,
        )
    files = {_filename(entry): entry for entry in _entries(package)}
    filename = tags.best(list(files), dict(ranks))
    entry = files[filename]
    url = _url(entry)
    digest = entry.get("hashes", {}).get("sha256")
    if digest is None:
        raise ResolveError(
            f"`{filename}` has no sha256",
            cause=f"the index that serves it gives none: {redacted(url)}",
            code="no-hash",
        )
    size = entry.get("size")
    _remember(digest, url)
    return Wheel(
        name=name,
        version=package.get("version") or filename.split("-")[1],
        filename=filename,
        sha256=digest,
        size=_size(url, indexes) if size is None else int(size),
    )


def _entries(package: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the wheel files of a pylock's package."""
    entries = package.get("wheels") or [entry for key in ("archive",) if (entry := package.get(key))]
    wheels = [entry for entry in entries if _filename(entry).endswith(".whl")]
    if wheels:
        return wheels
    raise ResolveError(
        f"`{package['name']}` comes as source and not as a wheel",
        cause="only wheels are installed: source built here gives files for this machine's Python",
        hint="use a version that has wheels; a package of your own goes into `packages` as `./path/to/it`",
        code="no-wheel",
    )


def _url(entry: Mapping[str, Any]) -> str:
    url: str | None = entry.get("url")
    return url if url is not None else Path(entry["path"]).absolute().as_uri()


def _filename(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or unquote(urlsplit(_url(entry)).path).rpartition("/")[2])


def _size(url: str, indexes: Indexes) -> int:
    """Return the size in bytes of a file whose index does not tell it."""
    if url.startswith("file:"):
        return local_path(url).stat().st_size
    parts = urlsplit(with_credentials(url, indexes))
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - http(s), from the host's own index
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_header("Authorization", "Basic " + base64.b64encode(secret.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
            length = answer.headers.get("Content-Length")
    except (urllib.error.URLError, OSError) as error:
        raise IndexUnreachableError(
            f"`{redacted(url)}` cannot be reached", cause=redacted(str(error))
        ) from error
    if length is None:
        raise ResolveError(f"the server of `{redacted(url)}` does not tell the file's size", code="no-size")
    return int(length)


def local_path(url: str) -> Path:
    """Return the path that a file: address means."""
    return Path(unquote(urlsplit(url).path))


# --- locating


def locate(lock: Lock, *, directory: Path | None = None) -> dict[str, str]:
    """Return where each wheel of a lock can be fetched: its sha256 to an address with credentials.

    `directory` is the spec's, to build its local packages again where the cache has lost them. Raises:
    ResolveError where the host's indexes do not have a file.
    """
    indexes = host_indexes()
    found = {wheel.sha256: url for wheel in lock.wheels if (url := _remembered(wheel.sha256))}
    for wheel in lock.wheels:
        if wheel.path is not None and wheel.sha256 not in found:
            found[wheel.sha256] = _build_again(wheel, wheel.path, directory, indexes)
    missing = [wheel for wheel in lock.wheels if wheel.sha256 not in found]
    if missing:
        found |= _ask_again(missing, lock, indexes)
    return {digest: with_credentials(url, indexes) for digest, url in found.items()}


def _build_again(wheel: Wheel, path: str, directory: Path | None, indexes: Indexes) -> str:
    if directory is None:
        raise ResolveError(
            f"the local package `{path}` is not in the cache",
            cause=f"`{wheel.filename}` was built from it when the spec was locked",
            hint="run `mlenv lock` for the spec again",
            code="local-lost",
        )
    _, packages = local.split([path], directory)
    built = local.build(packages[0], indexes)
    if built.sha256 != wheel.sha256:
        raise ResolveError(
            f"the local package `{path}` is not the one in the lock",
            cause=f"its wheel has sha256 {built.sha256} and the lock pins {wheel.sha256}",
            hint="run `mlenv lock` to pin what is there now",
            code="local-changed",
        )
    _remember(built.sha256, built.file.as_uri())
    return built.file.as_uri()


def _ask_again(missing: Sequence[Wheel], lock: Lock, indexes: Indexes) -> dict[str, str]:
    """Return the addresses of wheels that the cache does not know, from the host's indexes."""
    assert lock.python is not None  # noqa: S101 - a lock with wheels has a Python
    assert lock.platform.glibc is not None  # noqa: S101 - and a base
    target = Target(
        python=lock.python.version, architecture=lock.platform.architecture, glibc=lock.platform.glibc
    )
    wanted = Wanted(requirements=tuple(f"{wheel.name}==={wheel.version}" for wheel in missing))
    try:
        packages = _run(wanted, target, indexes, backend=None, dependencies=False)
    except uv.UvError as failure:
        variant = lock.pytorch.variant if lock.pytorch else None
        if variant is None or not any("+" in wheel.version for wheel in missing):
            raise uv.explain(failure, python=target.python, platform=target.platform) from failure
        packages = _run_on_torch_index(wanted, target, indexes, variant)
    urls = {entry.get("hashes", {}).get("sha256"): _url(entry) for row in packages for entry in _entries(row)}
    for wheel in missing:
        if wheel.sha256 not in urls:
            raise ResolveError(
                f"no package index of this host has the `{wheel.filename}` that the lock pins",
                cause=f"none of the files of {wheel.name} {wheel.version} there has sha256 {wheel.sha256}",
                hint="add the index it came from to pip's configuration, or run `mlenv lock --upgrade`",
                code="wheel-not-found",
            )
        _remember(wheel.sha256, urls[wheel.sha256])
    return {wheel.sha256: urls[wheel.sha256] for wheel in missing}


def _run_on_torch_index(
    wanted: Wanted, target: Target, indexes: Indexes, variant: str
) -> list[dict[str, Any]]:
    try:
        return _run(wanted, target, indexes, backend=variant, dependencies=False)
    except uv.UvError as failure:
        error = uv.explain(failure, python=target.python, platform=target.platform)
        if isinstance(error, IndexUnreachableError):
            error = IndexUnreachableError(
                f"the PyTorch wheel index cannot be reached, and the lock pins a `+{variant}` build",
                cause=error.cause,
                hint="let this machine reach it, or put its wheels into a `find-links` folder of pip",
                code="pytorch-index-unreachable",
            )
        raise error from failure


def _hints() -> Path:
    return paths.cache_dir() / "wheel-urls"


def _remember(digest: str, url: str) -> None:
    """Keep where a wheel was seen; a hint, checked by the digest when it is used."""
    hint = _hints() / digest
    hint.parent.mkdir(parents=True, exist_ok=True)
    partial = hint.with_name(f".{digest}.{os.getpid()}")
    partial.write_text(redacted(url).replace("***@", ""))
    partial.replace(hint)


def _remembered(digest: str) -> str | None:
    try:
        url = (_hints() / digest).read_text()
    except FileNotFoundError:
        return None
    return url if not url.startswith("file:") or local_path(url).is_file() else None
