"""From a spec to a lock: choose the PyTorch build, the Python and the base, then pin every package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.errors import ImpossibleCombinationError, ResolveError
from mlenv.lock.model import BaseLock, ImageLock, Lock, Platform, PythonLock, TorchLock
from mlenv.resolve import choice, debian, local, matrix, python, wheels
from mlenv.resolve.explain import Reason
from mlenv.resolve.indexes import host_indexes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlenv.lock.model import DebPackage, Wheel
    from mlenv.progress import Progress
    from mlenv.resolve.choice import Build, Request, System
    from mlenv.resolve.host import Host
    from mlenv.spec.model import Spec

ADDED = {
    "ipykernel": "the environment's Jupyter kernel runs it",
    "pip": "`%pip install` in a notebook needs it",
}
"""Packages every environment gets, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """What a spec becomes, and the reason for every choice."""

    lock: Lock
    reasons: tuple[Reason, ...]


def resolve(spec: Spec, *, host: Host, progress: Progress, mirror: str | None = None) -> Resolution:
    """Pin everything a spec asks for; the same inputs give the same lock.

    Asks the host's package indexes and Debian mirrors (`mirror`: others than apt's, see `mirrors.archives`).
    Raises: ResolveError and its kinds, before anything is downloaded.
    """
    if spec.image is not None:
        return _use_image(spec, spec.image, host)
    table = matrix.load()
    request = _request(spec, host)
    build, reasons = _choose_build(request, table)
    system, system_reasons = choice.choose_system(request, build.release if build else None, table)
    base, apt = _pin_debian(spec, system, host, progress, mirror)
    interpreter = _pin_python(system, base, request, host)
    glibc = table.bases[system.base].glibc
    target = wheels.Target(python=interpreter.version, architecture=host.architecture, glibc=glibc or "2.17")
    pinned = _pin_wheels(spec, build, target, progress)
    lock = Lock(
        name=spec.name,
        spec=spec.digest,
        platform=Platform(architecture=host.architecture, glibc=glibc),
        base=BaseLock(name=system.base, suite=debian.suite_of(system.base).codename, packages=base),
        apt=apt,
        python=interpreter,
        pytorch=_torch_lock(build, table) if build else None,
        wheels=pinned,
        build=tuple(spec.build),
    )
    return Resolution(lock=lock, reasons=(*reasons, *system_reasons, *_package_reasons(spec, build, lock)))


# --- what is asked


def _request(spec: Spec, host: Host) -> Request:
    if host.architecture != "amd64":
        raise ImpossibleCombinationError(
            f"environments are made for amd64 and this machine is {host.architecture}",
            cause="the compatibility data hold x86_64 builds",
            hint="resolve and run on an x86_64 machine",
            code="architecture",
        )
    sees_gpus = spec.gpus.mode != "none"
    return choice.Request(
        pytorch=spec.pytorch,
        cuda=_major_minor(spec.cuda),
        cudnn=spec.cudnn,
        python=spec.python,
        base=spec.base,
        bases=debian.BASES,
        gpus=host.gpus if sees_gpus else (),
        driver=host.driver if sees_gpus else None,
        where=lambda key: place(spec.path, key),
    )


def _major_minor(cuda: str | None) -> str | None:
    """Return CUDA as builds are named by it: "10.1.243" is a 10.1."""
    return cuda and ".".join(cuda.split(".")[:2])


def place(path: Path, key: str) -> str:
    """Return where a key of a spec is written ("envs/x.yaml:5"), or the file alone where it is not."""
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    written = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*:""")
    number = next((number for number, line in enumerate(lines, start=1) if written.match(line)), None)
    return f"{shown}:{number}" if number else str(shown)


def _choose_build(request: Request, table: matrix.Matrix) -> tuple[Build | None, list[Reason]]:
    if request.pytorch is None:
        reason = choice.check_cuda_alone(request, table)
        return None, [reason] if reason else []
    return choice.choose_build(request, table)


def _use_image(spec: Spec, image: str, host: Host) -> Resolution:
    """Lock a spec that takes an OCI image as it is: the digest in its reference is the pin."""
    reference, _, digest = image.partition("@")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise ResolveError(
            f"`image: {image}` does not say which image that is: a tag can move",
            cause="a lock pins the image's digest, and the reference holds none",
            hint=f"write `image: {reference}@sha256:…` in {place(spec.path, 'image')}; "
            f"`skopeo inspect docker://{reference}` shows the digest",
            code="image-not-pinned",
        )
    lock = Lock(
        name=spec.name,
        spec=spec.digest,
        platform=Platform(architecture=host.architecture),
        build=tuple(spec.build),
        image=ImageLock(reference=reference, digest=digest),
    )
    return Resolution(
        lock=lock, reasons=(Reason(subject="image", choice=image, because="the spec names it"),)
    )


# --- what is pinned


def _pin_debian(
    spec: Spec, system: System, host: Host, progress: Progress, mirror: str | None
) -> tuple[tuple[DebPackage, ...], tuple[DebPackage, ...]]:
    """Return the packages of the base, and those that `apt:` adds to it."""
    suite = debian.suite_of(system.base)
    with progress.step(f"choosing the packages of {system.base}") as step:
        with debian.solver(suite, architecture=host.architecture, mirror=mirror or spec.mirror) as apt:
            base = apt.base(suite)
            added = apt.additions(base, spec.apt)
        step.describe(f"{len(base) + len(added)} packages")
    return base, added


def _pin_python(system: System, base: Iterable[DebPackage], request: Request, host: Host) -> PythonLock:
    """Return the base's own Python where its full version fits the spec, else a standalone one."""
    wanted = request.wanted_python
    if not system.standalone:
        version = debian.python_version(tuple(base), system.python)
        if wanted.allows(version):
            return PythonLock(
                version=version, source=system.base, interpreter=f"/usr/bin/python{system.python}"
            )
    return python.standalone(wanted, system.python, architecture=host.architecture)


def _pin_wheels(
    spec: Spec, build: Build | None, target: wheels.Target, progress: Progress
) -> tuple[Wheel, ...]:
    directory = spec.path.parent
    indexes = host_indexes()
    with progress.step(f"choosing the Python packages for Python {target.python}") as step:
        remote, beside = local.split(spec.packages, directory)
        built = tuple(local.build(package, indexes) for package in beside)
        torch, constraints = wheels.torch_requirements(build) if build else ((), ())
        wanted = wheels.Wanted(
            requirements=(*torch, *remote, *_missing(spec)),
            constraints=constraints,
            files=((directory / spec.requirements).absolute(),) if spec.requirements else (),
            local=built,
        )
        pinned = wheels.resolve_wheels(wanted, target=target, build=build, indexes=indexes)
        step.describe(f"{len(pinned)} packages")
    return pinned


def _missing(spec: Spec) -> list[str]:
    """Return those of `ADDED` that the spec does not name itself."""
    named = {re.split(r"[\s\[<>=!~;@]", text.strip(), maxsplit=1)[0].lower() for text in spec.packages}
    return [name for name in ADDED if name not in named]


def _torch_lock(build: Build, table: matrix.Matrix) -> TorchLock:
    variant = build.variant
    return TorchLock(
        version=build.release.version,
        variant=variant.tag,
        cuda=variant.cuda,
        cudnn=variant.cudnn,
        sm=variant.sm or (),
        ptx=variant.ptx,
        min_driver=choice.min_driver(variant, table),
    )


def _package_reasons(spec: Spec, build: Build | None, lock: Lock) -> list[Reason]:
    versions = {wheel.name: wheel.version for wheel in lock.wheels}
    reasons = [
        Reason(subject=name, choice=versions[name], because=ADDED[name])
        for name in _missing(spec)
        if name in versions
    ]
    if build is None:
        return reasons
    release = build.release
    for pin in release.pins:
        name = re.split(r"[<>=!~]", pin, maxsplit=1)[0]
        because = (
            f"PyTorch {release.version} is older than the next major {name}, which breaks its import: `{pin}`"
        )
        if name in versions:
            reasons.append(Reason(subject=name, choice=versions[name], because=because))
    for name in ("torchvision", "torchaudio"):
        if name in versions:
            because = f"the release made for PyTorch {release.version}"
            reasons.append(Reason(subject=name, choice=versions[name], because=because))
    return reasons
