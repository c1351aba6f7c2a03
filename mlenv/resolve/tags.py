"""Which wheels an interpreter takes, best first, for a target that is not this machine.

Source: PEP 425 and PEP 600. musllinux wheels are never taken: the bases are glibc systems.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from mlenv.errors import ResolveError
from mlenv.resolve.versions import numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_ALIASES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_OLDEST_MINOR = {"x86_64": 5, "aarch64": 17}
_UV_GLIBC = (28, *range(31, 41))
"""Minor versions of glibc 2 that uv has a platform for, besides 17."""


def machine(architecture: str) -> str:
    """Return an architecture as wheels spell it."""
    return _MACHINES[architecture]


def uv_platform(architecture: str, glibc: str) -> str:
    """Return uv's name of the newest platform that `glibc` ("2.36") satisfies."""
    minor = numbers(glibc)[1]
    best = max((known for known in _UV_GLIBC if known <= minor), default=17)
    return f"{machine(architecture)}-manylinux_2_{best}"


def platforms(architecture: str, glibc: str) -> list[str]:
    """Return the platform tags of a glibc system, newest first."""
    cpu, newest = machine(architecture), numbers(glibc)[1]
    tags: list[str] = []
    for minor in range(newest, _OLDEST_MINOR[cpu] - 1, -1):
        tags.append(f"manylinux_2_{minor}_{cpu}")
        if minor in _ALIASES:
            tags.append(f"{_ALIASES[minor]}_{cpu}")
    return [*tags, f"linux_{cpu}"]


def supported(python: str, architecture: str, glibc: str) -> dict[Tag, int]:
    """Return every tag that CPython `python` takes there, with its rank; 0 is the best."""
    major, minor = numbers(python)[:2]
    abi = f"cp{major}{minor}" + (
        "m" if (major, minor) < (3, 8) else ""
    )  # PEP 425: pymalloc's flag went with 3.8
    names = platforms(architecture, glibc)
    own = cpython_tags((major, minor), [abi], names)
    pure = compatible_tags((major, minor), f"cp{major}{minor}", names)
    ranks: dict[Tag, int] = {}
    for tag in (*own, *pure):
        ranks.setdefault(tag, len(ranks))
    return ranks


def best(filenames: Sequence[str], ranks: dict[Tag, int]) -> str:
    """Return the wheel file that the target takes first.

    Raises: ResolveError where none fits.
    """
    fitting = [(rank, name) for name in filenames if (rank := _rank(name, ranks)) is not None]
    if not fitting:
        raise ResolveError(
            "none of these wheels fits the environment's Python and platform",
            cause=", ".join(filenames) or "the index lists none",
            code="no-wheel",
        )
    return min(fitting)[1]


def _rank(filename: str, ranks: dict[Tag, int]) -> tuple[int, tuple[int, str]] | None:
    """Return how a wheel ranks: by its best tag, then by the higher build number."""
    _, _, build, tags = parse_wheel_filename(filename)
    own = _best_rank(tags, ranks)
    number, suffix = build or (0, "")
    return None if own is None else (own, (-int(number), str(suffix)))


def _best_rank(tags: Iterable[Tag], ranks: dict[Tag, int]) -> int | None:
    return min((ranks[tag] for tag in tags if tag in ranks), default=None)
