"""The compatibility data as typed values: which PyTorch builds exist, and what each needs.

`load` reads data/compat.yaml (its header names every source). Nothing here knows a spec; `choice.py` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DATA = Path(__file__).parents[1] / "data" / "compat.yaml"
CPU = "cpu"
"""The variant without CUDA."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One build of a PyTorch release: `tag` is its local version ("cu101", "cpu").

    `sm` and `ptx`: compute capabilities times ten of the code inside; `sm` is None where nobody has recorded
    it.
    """

    tag: str
    cuda: str | None = None
    cudnn: str | None = None
    sm: tuple[int, ...] | None = ()
    ptx: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """One PyTorch release; `default` is the tag of the variant that PyPI serves for x86_64 Linux."""

    version: str
    pythons: tuple[str, ...]
    glibc: str
    default: str
    variants: Mapping[str, Variant]
    torchvision: str | None
    torchaudio: str | None
    pins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cudnn:
    """One cuDNN release: the CUDA versions it was published for; `min_sm`: compute capability times ten."""

    version: str
    cuda: tuple[str, ...]
    min_sm: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """An operating-system base as the data know it: glibc and the CPython it ships ("3.11")."""

    name: str
    glibc: str | None
    python: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """All of it; `releases` newest first, `drivers`: CUDA to the oldest driver of its first release."""

    releases: tuple[Release, ...]
    drivers: Mapping[str, str | None]
    minor_compat_drivers: Mapping[str, str]
    cudnn: Mapping[str, Cudnn]
    capabilities: Mapping[str, str]
    bases: Mapping[str, Base]


def load(path: Path = DATA) -> Matrix:
    """Read the data: 0.1 s, so only a resolution does it. Scalars are text, as in the specs."""
    import yaml

    with path.open("rb") as file:
        data = yaml.load(file, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))  # noqa: S506 - text only
    torch, cuda = data["torch"], data["cuda"]
    toolkits = cuda["toolkits"]
    releases = [_release(version, row, torch["cuda_of"]) for version, row in torch["releases"].items()]
    return Matrix(
        releases=tuple(reversed(releases)),
        drivers={version: _maybe(row["driver"]) for version, row in toolkits.items()},
        minor_compat_drivers=cuda["minor_compat_driver"],
        cudnn={version: _cudnn(version, row, list(toolkits)) for version, row in data["cudnn"].items()},
        capabilities={name.rstrip("*"): sm for sm, names in data["gpus"].items() for name in names},
        bases={name: _base(name, row) for name, row in data["base_os"].items()},
    )


def _maybe(text: Any) -> Any:
    """Return None for YAML's null, which the base loader leaves as text."""
    return None if text in ("null", "") else text


def _numbers(texts: Any) -> tuple[int, ...] | None:
    return None if _maybe(texts) is None else tuple(int(text) for text in texts)


def _release(version: str, row: Mapping[str, Any], cuda_of: Mapping[str, str]) -> Release:
    pypi = row["pypi"]["cuda"]
    tag_of = {cuda: tag for tag, cuda in cuda_of.items()}
    return Release(
        version=version,
        pythons=tuple(
            python for python in row["python"] if not python.endswith("t")
        ),  # free-threaded: not chosen
        glibc=row["pypi"]["glibc"],
        default=tag_of.get(pypi, CPU),
        variants={tag: _variant(tag, fields, cuda_of) for tag, fields in row["variants"].items()},
        torchvision=_maybe(row["torchvision"]),
        torchaudio=_maybe(row["torchaudio"]),
        pins=tuple(row.get("pin", ())),
    )


def _variant(tag: str, row: Mapping[str, Any], cuda_of: Mapping[str, str]) -> Variant:
    if tag == CPU:
        return Variant(tag=CPU)
    return Variant(
        tag=tag,
        cuda=cuda_of[tag],
        cudnn=_maybe(row["cudnn"]),
        sm=_numbers(row["sm"]),
        ptx=_numbers(row["ptx"]) or (),
    )


def _cudnn(version: str, row: Mapping[str, Any], toolkits: list[str]) -> Cudnn:
    ranges = row.get("cuda_range", [[cuda, cuda] for cuda in row.get("cuda", ())])
    covered: list[str] = []
    for first, last in ranges:
        inside = toolkits[toolkits.index(first) : toolkits.index(last) + 1] if first in toolkits else [first]
        covered += [cuda for cuda in inside if cuda not in covered]
    return Cudnn(version=version, cuda=tuple(covered), min_sm=int(row.get("min_sm", 0)))


def _base(name: str, row: Mapping[str, Any]) -> Base:
    return Base(name=name, glibc=_maybe(row["glibc"]), python=_maybe(row["python"]))
