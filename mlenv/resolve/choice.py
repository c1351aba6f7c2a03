"""Choose a PyTorch build, a Python and a base for what a spec asks, or say which versions exist instead.

Order: PyTorch release, then its variant, then Python, then the base. Every candidate is kept with the fault
that rules it out; the first without one is taken, and where all have one the first candidate's becomes the
error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlenv.errors import ImpossibleCombinationError
from mlenv.resolve.explain import Reason
from mlenv.resolve.matrix import CPU, Matrix, Release, Variant
from mlenv.resolve.versions import Wanted, has_prefix, numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mlenv.resolve.host import Gpu

STANDALONE_PYTHONS = ("3.14", "3.13", "3.12", "3.11", "3.10", "3.9", "3.8")
"""CPython minor releases, newest first, that uv can fetch as standalone builds and ipykernel still
supports.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a spec asks for.

    `where` gives the place of a key in it ("envs/x.yaml:5") for the one-line edits.
    `pytorch` may carry a local version ("2.13.0+cpu"); `cuda` is "cpu", a version or None for the best one.
    `bases`: the bases that can be built, newest first. `gpus`: those the environment would see; `driver`
    theirs.
    """

    pytorch: str | None
    cuda: str | None
    cudnn: str | None
    python: str | None
    base: str | None
    bases: tuple[str, ...]
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    where: Callable[[str], str] = "the spec's `{}`".format

    @property
    def wanted_python(self) -> Wanted:
        """Return the Python asked for."""
        return Wanted(key="python", text=self.python)


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """A PyTorch build: a release in one of its variants."""

    release: Release
    variant: Variant

    @property
    def local_version(self) -> str:
        """Return the version as the wheel carries it: PyPI's default build has no local part."""
        plain = self.variant.tag == self.release.default
        return self.release.version if plain else f"{self.release.version}+{self.variant.tag}"


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """A base and the Python minor release on it, the base's own or a `standalone` one."""

    base: str
    python: str
    standalone: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Why a build cannot be taken; `gpu` where this machine's GPUs or driver are the reason."""

    message: str
    cause: str
    hint: str
    code: str
    gpu: bool = False

    def error(self) -> ImpossibleCombinationError:
        """Return it as the error a user sees."""
        return ImpossibleCombinationError(self.message, cause=self.cause, hint=self.hint, code=self.code)


def cuda_text(variant: Variant) -> str:
    """Return a variant as a spec writes it in `cuda`."""
    return variant.cuda or CPU


# --- PyTorch


def choose_build(request: Request, matrix: Matrix) -> tuple[Build, list[Reason]]:
    """Return the newest build that satisfies the request.

    Raises: ImpossibleCombinationError naming what exists and the edit that fits.
    """
    candidates = list(_candidates(request, matrix))
    faults: list[tuple[Build, Fault]] = []
    for build in candidates:
        fault = _fault(build, request, matrix)
        if fault is None:
            return build, _build_reasons(build, request, matrix, faults)
        faults.append((build, fault))
    raise _most_telling(faults).error()


def _most_telling(faults: Sequence[tuple[Build, Fault]]) -> Fault:
    """Return the fault of the newest build; one of this machine's counts only when no other kind is there."""
    return next((fault for _, fault in faults if not fault.gpu), faults[0][1])


def _candidates(request: Request, matrix: Matrix) -> Iterator[Build]:
    """Yield the builds asked for, best first."""
    text, _, local = (request.pytorch or "").partition("+")
    wanted = Wanted(key="pytorch", text=text)
    releases = [release for release in matrix.releases if wanted.allows(release.version)]
    if not releases:
        raise _no_release(request, matrix)
    cuda = _cuda_of_local(local, request, matrix) if local else request.cuda
    builds = [build for release in releases for build in _variants(release, cuda, request)]
    if not builds:
        raise _no_variant(releases, cuda, request, matrix)
    yield from builds


def _cuda_of_local(local: str, request: Request, matrix: Matrix) -> str:
    """Return the CUDA that a local version ("cu101") means."""
    known = {
        tag: cuda_text(variant) for release in matrix.releases for tag, variant in release.variants.items()
    }
    if local not in known:
        raise ImpossibleCombinationError(
            f"no PyTorch build is called `+{local}`",
            cause=f"the builds are {', '.join(sorted(known))}",
            hint=f"write one of these in {request.where('pytorch')}, or use `cuda:`",
        )
    cuda = known[local]
    if request.cuda not in (None, cuda):
        raise ImpossibleCombinationError(
            f"`pytorch: {request.pytorch}` and `cuda: {request.cuda}` contradict each other",
            cause=f"`+{local}` is the build for {_cuda_name(cuda)}",
            hint=f'set `cuda: "{cuda}"` in {request.where("cuda")}',
        )
    return cuda


def _variants(release: Release, cuda: str | None, request: Request) -> list[Build]:
    """Return a release's builds for `cuda`; without one, those for the GPUs found, PyPI's own first."""
    cpu_only = cuda is None and not request.gpus and not request.cudnn
    if cuda == CPU or cpu_only:
        tags = [CPU] if CPU in release.variants else []
    elif cuda is not None:
        tags = [tag for tag, variant in release.variants.items() if variant.cuda == cuda]
    else:
        with_cuda = [tag for tag, variant in release.variants.items() if variant.cuda]
        with_cuda.sort(key=lambda tag: numbers(release.variants[tag].cuda or "0"), reverse=True)
        tags = sorted(with_cuda, key=lambda tag: tag != release.default)
    return [Build(release=release, variant=release.variants[tag]) for tag in tags]


def _fault(build: Build, request: Request, matrix: Matrix) -> Fault | None:
    """Return what rules a build out, or None."""
    for check in (_python_fault, _cudnn_fault, _gpu_fault, _driver_fault):
        fault = check(build, request, matrix)
        if fault:
            return fault
    return None


def _python_fault(build: Build, request: Request, matrix: Matrix) -> Fault | None:
    del matrix
    pythons = build.release.pythons
    if any(request.wanted_python.allows_minor(python) for python in pythons):
        return None
    return Fault(
        message=f"PyTorch {build.release.version} has no wheels for Python {request.python}",
        cause=f"its wheels are for Python {_listing(pythons)}",
        hint=f'set `python: "{pythons[-1]}"` in {request.where("python")}, or choose another PyTorch',
        code="impossible-combination",
    )


def _cudnn_fault(build: Build, request: Request, matrix: Matrix) -> Fault | None:
    """Return why the spec's `cudnn` does not agree with the build, whose property cuDNN is."""
    wanted, has = request.cudnn, build.variant.cudnn
    if wanted is None or (has is not None and has_prefix(has, wanted)):
        return None
    cuda = build.variant.cuda
    title = f"PyTorch {build.release.version} for {_cuda_name(cuda)}"
    if cuda is None or has is None:
        says = "contains no cuDNN" if cuda is None else "comes with a cuDNN that the data do not record"
        hint = f"remove `cudnn` from {request.where('cudnn')}"
        return Fault(
            message=f"{title} {says}", cause=f"`cudnn: {wanted}` cannot hold", hint=hint, code="cudnn"
        )
    message, history = _cudnn_history(wanted, cuda, matrix)
    return Fault(
        message=message or f"{title} is not built with cuDNN {wanted}",
        cause=f"{history}{title} is built with cuDNN {has}",
        hint=f'set `cudnn: "{_minor(has)}"` in {request.where("cudnn")}, or leave the key out',
        code="impossible-combination",
    )


def _cudnn_history(wanted: str, cuda: str, matrix: Matrix) -> tuple[str | None, str]:
    """Return a message where cuDNN `wanted` never existed for `cuda`, and lines saying what did."""
    of_cuda = [row.version for row in matrix.cudnn.values() if cuda in row.cuda]
    matching = [row for row in matrix.cudnn.values() if has_prefix(row.version, wanted)]
    if any(cuda in row.cuda for row in matching):
        return None, f"cuDNN for CUDA {cuda} exists as {_listing(of_cuda)}\n"
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in matching:
        groups.setdefault(row.cuda, []).append(row.version)
    existed = "; ".join(
        f"{_listing(versions)} for CUDA {_listing(cudas)}" for cudas, versions in groups.items()
    )
    lines = [
        f"cuDNN {wanted} was published only as {existed}" if existed else f"the data know no cuDNN {wanted}"
    ]
    if of_cuda:
        lines.append(f"cuDNN for CUDA {cuda} exists as {_listing(of_cuda)}")
    return f"cuDNN {wanted} was never published for CUDA {cuda}", "\n".join(lines) + "\n"


# --- GPUs and driver


def capability(gpu: Gpu, matrix: Matrix) -> int | None:
    """Return a GPU's compute capability times ten, from the driver or else from the model's name."""
    text = (
        gpu.compute_capability
        or matrix.capabilities.get(gpu.name)
        or matrix.capabilities.get(gpu.name.removeprefix("NVIDIA "))
    )
    if text is None:
        return None
    major, minor = numbers(text)
    return major * 10 + minor


def runs_on(variant: Variant, sm: int, matrix: Matrix, *, compiled: bool = False) -> bool:
    """Say whether a variant holds code for a compute capability (times ten).

    `compiled`: count no PTX. PyTorch's own kernels run from it, those of a cuDNN and cuBLAS older than the
    GPU may not, so it is good enough for a build the user names and not for one recommended.
    """
    known = matrix.cudnn.get(variant.cudnn or "")
    floor = known.min_sm if known else 0
    from_ptx = not compiled and any(sm >= ptx for ptx in variant.ptx)
    return sm >= floor and (_has_cubin(variant, sm) or from_ptx)


def _has_cubin(variant: Variant, sm: int) -> bool:
    return any(sm // 10 == has // 10 and sm >= has for has in variant.sm or ())


def _gpu_fault(build: Build, request: Request, matrix: Matrix) -> Fault | None:
    known = [(gpu, sm) for gpu in request.gpus if (sm := capability(gpu, matrix)) is not None]
    variant = build.variant
    if not variant.cuda or variant.sm is None or not known:
        return None if variant.sm is not None or request.cuda else _unrecorded(build)
    if any(runs_on(variant, sm, matrix, compiled=request.cuda is None) for _, sm in known):
        return None
    gpu, sm = known[0]
    return Fault(
        message=f"PyTorch {build.release.version} for CUDA {variant.cuda} cannot run on {gpu.name}",
        cause=f"its compute capability is {_dotted(sm)}; the build has code for {_capabilities(variant)}",
        hint=_nearest_hint(build, request, matrix),
        code="gpu-too-new" if sm > max(variant.sm) else "gpu-too-old",
        gpu=True,
    )


def _unrecorded(build: Build) -> Fault:
    return Fault(
        message=f"the data do not say on which GPUs PyTorch {build.local_version} runs",
        cause="its list of GPU architectures was never recorded",
        hint=f'choose it with `cuda: "{build.variant.cuda}"` if you know that it does',
        code="impossible-combination",
        gpu=True,
    )


def _driver_fault(build: Build, request: Request, matrix: Matrix) -> Fault | None:
    needed = min_driver(
        build.variant, matrix, *(sm for gpu in request.gpus if (sm := capability(gpu, matrix)))
    )
    if not needed or not request.driver or numbers(request.driver) >= numbers(needed):
        return None
    return Fault(
        message=f"PyTorch {build.release.version} for CUDA {build.variant.cuda} needs a newer NVIDIA driver",
        cause=f"it needs driver {needed} or newer and this machine has {request.driver}",
        hint=f"{_nearest_hint(build, request, matrix)}; or update the driver to {needed} or newer",
        code="driver-too-old",
        gpu=True,
    )


def min_driver(variant: Variant, matrix: Matrix, *gpus: int) -> str | None:
    """Return the oldest driver a variant runs on, or None where none is needed or known.

    From CUDA 11 on any driver of the same major release will do, unless PTX has to be compiled for one of
    `gpus` (compute capabilities times ten). Source: CUDA Compatibility, "Minor Version Compatibility".
    """
    if not variant.cuda:
        return None
    compiled = all(_has_cubin(variant, sm) for sm in gpus)
    own = matrix.drivers.get(variant.cuda)
    return matrix.minor_compat_drivers.get(variant.cuda.split(".")[0], own) if compiled else own


def _nearest_hint(build: Build, request: Request, matrix: Matrix) -> str:
    """Return the edit to the nearest build that runs here: the same release first, then the closest one."""
    bare = Request(
        pytorch=None,
        cuda=None,
        cudnn=None,
        python=None,
        base=None,
        bases=(),
        gpus=request.gpus,
        driver=request.driver,
    )
    order = list(matrix.releases)
    here = order.index(build.release)
    for release in sorted(order, key=lambda other: abs(order.index(other) - here)):
        for other in _variants(release, None, bare):
            if other.variant != build.variant and not _runs_not(other, bare, matrix):
                return _edit(build, other, request)
    return 'no PyTorch build in the data runs on this GPU and driver: set `cuda: "cpu"`'


def _runs_not(build: Build, request: Request, matrix: Matrix) -> bool:
    if build.variant.sm is None:
        return True
    sms = [sm for gpu in request.gpus if (sm := capability(gpu, matrix)) is not None]
    if sms and not any(runs_on(build.variant, sm, matrix, compiled=True) for sm in sms):
        return True
    needed = min_driver(build.variant, matrix, *sms)
    return bool(needed and request.driver and numbers(request.driver) < numbers(needed))


def _edit(build: Build, other: Build, request: Request) -> str:
    edits = []
    if other.release != build.release:
        edits.append(f'`pytorch: "{other.release.version}"` in {request.where("pytorch")}')
    edits.append(f'`cuda: "{other.variant.cuda}"` in {request.where("cuda")}')
    return "set " + " and ".join(edits)


# --- errors about what does not exist


def _no_release(request: Request, matrix: Matrix) -> ImpossibleCombinationError:
    wanted = (request.pytorch or "").partition("+")[0]
    versions = [release.version for release in matrix.releases]
    major = [
        version for version in versions if version.split(".")[0] == wanted.lstrip("<>=~! ").split(".")[0]
    ]
    near = (major or versions)[:8]
    return ImpossibleCombinationError(
        f"no PyTorch release matches `{request.pytorch}`",
        cause=f"the nearest of the {len(versions)} releases known here are {', '.join(near)}",
        hint=f'set `pytorch: "{near[0]}"` in {request.where("pytorch")}',
    )


def _no_variant(
    releases: Sequence[Release], cuda: str | None, request: Request, matrix: Matrix
) -> ImpossibleCombinationError:
    newest = releases[0]
    exist = [cuda_text(variant) for variant in newest.variants.values()]
    elsewhere = [
        release.version
        for release in matrix.releases
        if any(cuda_text(variant) == cuda for variant in release.variants.values())
    ]
    cause = f"PyTorch {newest.version} was built for {_listing(exist)}"
    if elsewhere:
        cause += f"\n{_cuda_name(cuda)} builds exist of {elsewhere[-1]} to {elsewhere[0]}"
    asked = f"PyTorch {request.pytorch}" if len(releases) > 1 else f"PyTorch {newest.version}"
    return ImpossibleCombinationError(
        f"{asked} was never built for {_cuda_name(cuda)}",
        cause=cause,
        hint=f'set `cuda: "{_nearest_cuda(cuda, exist)}"` in {request.where("cuda")}',
    )


def _nearest_cuda(cuda: str | None, exist: Sequence[str]) -> str:
    versions = [text for text in exist if text != CPU]
    if not versions or cuda in (None, CPU):
        return exist[-1]
    wanted = _as_float(cuda or "0")
    return min(versions, key=lambda text: abs(_as_float(text) - wanted))


def _as_float(version: str) -> float:
    major, minor = (*numbers(version), 0)[:2]
    return major + minor / 100


# --- without PyTorch


def check_cuda_alone(request: Request, matrix: Matrix) -> Reason | None:
    """Check `cuda` and `cudnn` of a spec without PyTorch: they only state what must run here.

    Raises: ImpossibleCombinationError where CUDA has no such release, cuDNN none for it, or the driver is too
    old.
    """
    cuda = request.cuda
    if cuda is None or cuda == CPU:
        return None
    if cuda not in matrix.drivers:
        raise ImpossibleCombinationError(
            f"there is no CUDA {cuda}",
            cause=f"the releases known here are {', '.join(matrix.drivers)}",
            hint=f'set `cuda: "{_nearest_cuda(cuda, list(matrix.drivers))}"` in {request.where("cuda")}',
        )
    if request.cudnn:
        _require_cudnn(request.cudnn, cuda, request, matrix)
    needed = min_driver(Variant(tag="", cuda=cuda), matrix)
    if needed and request.driver and numbers(request.driver) < numbers(needed):
        raise ImpossibleCombinationError(
            f"CUDA {cuda} needs a newer NVIDIA driver",
            cause=f"it needs driver {needed} or newer and this machine has {request.driver}",
            hint=f"update the driver to {needed} or newer, or lower `cuda` in {request.where('cuda')}",
            code="driver-too-old",
        )
    because = "the spec names no PyTorch: `cuda` installs nothing and only requires a driver"
    return Reason(subject="cuda", choice=f"driver >= {needed}" if needed else cuda, because=because)


def _require_cudnn(wanted: str, cuda: str, request: Request, matrix: Matrix) -> None:
    message, history = _cudnn_history(wanted, cuda, matrix)
    if message is None:
        return
    known = [row.version for row in matrix.cudnn.values() if cuda in row.cuda]
    hint = f'set `cudnn: "{_minor(known[-1])}"` in {request.where("cudnn")}, or leave the key out'
    raise ImpossibleCombinationError(message, cause=history.strip(), hint=hint)


# --- Python and base


def choose_system(request: Request, release: Release | None, matrix: Matrix) -> tuple[System, list[Reason]]:
    """Return the base and the Python on it: a base's own Python before a standalone one, newer before older.

    Raises: ImpossibleCombinationError where the base named cannot be built, or is too old for the wheels.
    """
    names = _usable_bases(request, release, matrix)
    pythons = _pythons(request, release)
    for name in names:
        own = matrix.bases[name].python
        if own in pythons:
            system = System(base=name, python=own, standalone=False)
            return system, _system_reasons(system, request, release, matrix)
    if not pythons:
        raise ImpossibleCombinationError(
            f"there is no Python {request.python} to install",
            cause=f"the bases have {_listing([matrix.bases[name].python or '' for name in request.bases])} "
            f"and uv can fetch {_listing(STANDALONE_PYTHONS)}",
            hint=f'set `python: "{STANDALONE_PYTHONS[0]}"` in {request.where("python")}',
        )
    system = System(base=names[0], python=pythons[0], standalone=True)
    return system, _system_reasons(system, request, release, matrix)


def _pythons(request: Request, release: Release | None) -> list[str]:
    """Return the Python minor releases that the spec and the wheels allow, newest first."""
    exist = tuple(reversed(release.pythons)) if release else STANDALONE_PYTHONS
    return [python for python in exist if request.wanted_python.allows_minor(python)]


def _usable_bases(request: Request, release: Release | None, matrix: Matrix) -> list[str]:
    """Return the bases on which the release's wheels run, newest first; only the one named where one is."""
    if request.base is not None and request.base not in request.bases:
        raise ImpossibleCombinationError(
            f"`base: {request.base}` cannot be built",
            cause=f"the bases are {', '.join(request.bases)}",
            hint=f"set `base: {request.bases[0]}` in {request.where('base')}, or leave the key out",
            code="unknown-base",
        )
    floor = release.glibc if release else "0"
    asked = [request.base] if request.base else list(request.bases)
    usable = [name for name in asked if numbers(matrix.bases[name].glibc or "0") >= numbers(floor)]
    if not usable:
        raise ImpossibleCombinationError(
            f"PyTorch {release.version if release else ''} does not run on {request.base}",
            cause=f"its wheels need glibc {floor} and {request.base} has {matrix.bases[asked[0]].glibc}",
            hint=f"set `base: {request.bases[0]}` in {request.where('base')}, or leave the key out",
        )
    return usable


# --- reasons


def _build_reasons(
    build: Build, request: Request, matrix: Matrix, faults: Iterable[tuple[Build, Fault]]
) -> list[Reason]:
    rejected = tuple(f"{other.local_version}: {fault.message} ({fault.cause})" for other, fault in faults)
    release, variant = build.release, build.variant
    reasons = [
        Reason(
            subject="pytorch",
            choice=release.version,
            because=f"the newest release that satisfies `pytorch: {request.pytorch}` and the keys beside it",
            rejected=rejected,
        ),
        Reason(subject="cuda", choice=cuda_text(variant), because=_variant_because(build, request, matrix)),
    ]
    if variant.cudnn:
        agrees = f", which `cudnn: {request.cudnn}` agrees with" if request.cudnn else ""
        because = f"PyTorch {release.version} for CUDA {variant.cuda} is built with it{agrees}"
        reasons.append(Reason(subject="cudnn", choice=variant.cudnn, because=because))
    return reasons


def _variant_because(build: Build, request: Request, matrix: Matrix) -> str:
    variant = build.variant
    if "+" in (request.pytorch or "") or request.cuda:
        because = "the spec asks for it"
    elif variant.tag == CPU:
        because = "the spec asks for no CUDA and no NVIDIA GPU was found"
    elif request.gpus:
        names = ", ".join(sorted({gpu.name for gpu in request.gpus}))
        because = f"it runs on {names} with driver {request.driver}"
    else:
        because = "the spec asks for cuDNN, so for a CUDA build; no GPU was found to check it against"
    needed = min_driver(variant, matrix)
    return f"{because}; needs driver {needed} or newer" if needed else because


def _system_reasons(
    system: System, request: Request, release: Release | None, matrix: Matrix
) -> list[Reason]:
    asked = f"`python: {request.python}`" if request.python else "the spec, which names none"
    wheels = f" and the wheels of PyTorch {release.version} ({_listing(release.pythons)})" if release else ""
    if system.standalone:
        why = f"no base among {', '.join(request.bases)} has a Python that fits {asked}{wheels}"
        if request.base:
            own = matrix.bases[request.base].python
            why = f"{request.base} has Python {own}, which does not fit {asked}{wheels}"
    else:
        why = f"{system.base}'s own, and it fits {asked}{wheels}"
    others = [name for name in request.bases if name != system.base]
    floor = f"its glibc {matrix.bases[system.base].glibc}"
    floor += f" is at least the wheels' {release.glibc}" if release else " runs the wheels"
    return [
        Reason(subject="python", choice=system.python, because=why),
        Reason(
            subject="base",
            choice=system.base,
            because="the spec names it" if request.base else f"the newest base with this Python; {floor}",
            rejected=tuple(
                f"{name}: the spec names another"
                if request.base
                else f"{name}: glibc {matrix.bases[name].glibc}, Python {matrix.bases[name].python}"
                for name in others
            ),
        ),
    ]


# --- words


def _cuda_name(cuda: str | None) -> str:
    return "the CPU" if cuda in (None, CPU) else f"CUDA {cuda}"


def _listing(items: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else "none"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _dotted(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"


def _capabilities(variant: Variant) -> str:
    return _listing([_dotted(sm) for sm in variant.sm or ()])
