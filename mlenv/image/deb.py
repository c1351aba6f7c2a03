"""Debian packages: reading a `.deb` without dpkg.

Source: deb(5), deb-control(5); `ar` as in deb(5), Format.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from mlenv.errors import ImageError
from mlenv.image.unpack import read_entries

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAGIC = b"!<arch>\n"
_HEADER = 60
_CONTROL_MAX = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """What a package says of itself: its fields as text."""

    fields: dict[str, str]

    @property
    def name(self) -> str:
        """Return the package's name."""
        return self.fields["Package"]

    @property
    def is_essential(self) -> bool:
        """Whether maintainer scripts may rely on it without saying so."""
        return self.fields.get("Essential") == "yes"

    def names_in(self, field: str) -> set[str]:
        """Return every package name in a dependency field, alternatives included, without versions."""
        clauses = self.fields.get(field, "").replace("|", ",").split(",")
        return {clause.split("(")[0].split(":")[0].strip() for clause in clauses if clause.strip()}

    @property
    def provides(self) -> set[str]:
        """Return the names it answers to."""
        return {self.name, *self.names_in("Provides")}


def read_control(path: Path) -> Control:
    """Return the control file of a package.

    Raises: ImageError where it is no package.
    """
    with _member(path, "control.tar") as tar:
        for entry, content in read_entries(tar.read):
            if entry.path.removeprefix("./") == "control" and entry.size < _CONTROL_MAX:
                return Control(fields=_fields(b"".join(content).decode()))
    raise ImageError(f"`{path.name}` has no control file")


def _fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line[:1] in {" ", "\t"}:
            fields[name] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


@contextmanager
def data_tar(path: Path) -> Iterator[BinaryIO]:
    """Open the tar of a package's files.

    Raises: ImageError where it is no package, or compressed in a way this machine cannot read.
    """
    with _member(path, "data.tar") as tar:
        yield tar


@contextmanager
def _member(path: Path, prefix: str) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        name, size = _find(file, path, prefix)
        window = _Window(file, size)
        match name.removeprefix(prefix):
            case "":
                yield io.BufferedReader(window)
            case ".gz":
                yield gzip.GzipFile(fileobj=io.BufferedReader(window))  # type: ignore[misc]
            case ".xz" | ".lzma":
                yield lzma.LZMAFile(io.BufferedReader(window))  # type: ignore[misc]  # noqa: SIM115
            case ".bz2":
                yield bz2.BZ2File(io.BufferedReader(window))  # type: ignore[misc]
            case ".zst":
                yield io.BytesIO(_zstd(window.readall(), path))
            case suffix:
                raise ImageError(f"`{path.name}` is compressed in the unknown way `{suffix}`")


def _find(file: BinaryIO, path: Path, prefix: str) -> tuple[str, int]:
    """Go to the member whose name starts with `prefix`; return its name and size in bytes."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ImageError(f"`{path.name}` is no Debian package")
    while len(header := file.read(_HEADER)) == _HEADER:
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith(prefix):
            return name, size
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ImageError(f"`{path.name}` has no {prefix}")


class _Window(io.RawIOBase):
    """The next `size` bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._file.read(min(len(view), self._left))
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)


def _zstd(packed: bytes, path: Path) -> bytes:
    """Return what `packed` holds, through the `zstd` command: Debian's packages up to 13 do not need it."""
    if shutil.which("zstd") is None:
        raise ImageError(f"`{path.name}` is compressed with zstd", hint="apt-get install zstd")
    return subprocess.run(["zstd", "-dc"], input=packed, capture_output=True, check=True).stdout
