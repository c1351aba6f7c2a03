"""The lock: everything an environment is made of, pinned and hashed, as plain values.

A lock holds no URL, host name or time: mirrors and indexes are found on the machine that uses it, and equal
inputs give equal bytes. `mlenv.lock.file` reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlenv.lock import canonical

SCHEMA = 1
"""The form of lock that this version writes and reads."""

ARCHIVES = ("main", "security")
"""Debian's archives; a lock keeps the word, each host knows its mirror of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """What the environment runs on: `os` and `architecture` as OCI spells them, the base's C library."""

    os: str = "linux"
    architecture: str = "amd64"
    glibc: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DebPackage:
    """One Debian package: `path` below a mirror's root ("pool/…"), `sha256` in hex, `size` in bytes."""

    name: str
    version: str
    architecture: str
    path: str
    archive: str
    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseLock:
    """The operating system below everything else: `name` as in the spec ("debian:12"), suite and packages."""

    name: str
    suite: str
    packages: tuple[DebPackage, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonLock:
    """The interpreter: the base's own (`source` "debian:12"), or one that uv fetches (`source` "standalone").

    `key` (uv's name of the build) and `sha256` (of its archive, hex) belong to a standalone one.
    """

    version: str
    source: str
    interpreter: str
    key: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchLock:
    """The PyTorch build and what it runs on.

    `sm` and `ptx`: compute capabilities times ten (75 is 7.5) of the compiled and the intermediate code.
    """

    version: str
    variant: str
    cuda: str | None = None
    cudnn: str | None = None
    sm: tuple[int, ...] = ()
    ptx: tuple[int, ...] = ()
    min_driver: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """One wheel: `sha256` in hex, `size` in bytes; `path`: a local package's source, seen from the spec."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    path: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLock:
    """An OCI image used as it is: the reference as written, and the digest it had ("sha256:…")."""

    reference: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lock:
    """An environment with everything pinned; `spec` is the digest of the spec it was made from."""

    schema: int = SCHEMA
    name: str
    spec: str
    platform: Platform
    base: BaseLock | None = None
    apt: tuple[DebPackage, ...] = ()
    python: PythonLock | None = None
    pytorch: TorchLock | None = None
    wheels: tuple[Wheel, ...] = ()
    build: tuple[str, ...] = ()
    image: ImageLock | None = None

    @property
    def digest(self) -> str:
        """Return the digest of the lock's canonical bytes ("sha256:…")."""
        return canonical.digest(canonical.dump(self))
