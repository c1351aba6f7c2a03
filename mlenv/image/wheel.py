"""Wheels: one wheel unpacked as one tree, ready to be a layer.

The tree is what an installer would put below `/opt/env`, with nothing of this machine in it: paths, modes and
times come from the wheel alone, scripts start with the environment's interpreter, and there is no bytecode.
Every file is checked against RECORD while it is written.

Source: PyPA specifications, Binary distribution format, Recording installed projects, Entry points; PKWARE
APPNOTE.
"""

from __future__ import annotations

import base64
import configparser
import csv
import hashlib
import io
import mmap
import os
import posixpath
import re
import stat
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isal import isal_zlib

from mlenv.errors import BadWheelError
from mlenv.image.digest import canonical_json, digest_of
from mlenv.image.layer import Entry, LayerFacts, LayerWriter, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

UNPACKER = 1
"""Version of what a wheel's tree looks like; part of its key."""

PREFIX = "/opt/env"
"""Where the environment lies in the container."""

INTERPRETER = f"{PREFIX}/bin/python"

MTIME_ORIGIN = 315619200
"""1980-01-02 UTC, seconds since the epoch: the first day that every zip tool can store."""

_CHUNK = 1 << 20
_FILES_MAX = 1_000_000
_RATIO_MAX = 200
_SLACK = 64 << 20
_STORED, _DEFLATED = 0, 8
_DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    isal_zlib.error,  # type: ignore[assignment] # a class, whatever its stub says
    KeyError,
    UnicodeDecodeError,
    csv.Error,
    configparser.Error,
)
_ENCRYPTED = 0x1

_SCRIPT = """\
#!{interpreter}
import sys
from {module} import {first}
if __name__ == "__main__":
    sys.argv[0] = sys.argv[0].removesuffix(".exe")
    sys.exit({callable}())
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A file of the tree: from the wheel (`info`), or made here (`content`)."""

    path: str
    mode: int
    info: zipfile.ZipInfo | None = None
    content: bytes = b""
    hash: tuple[str, str] | None = None


def tree_key(sha256: str, python: str) -> str:
    """Return the key of a wheel's tree: what it holds depends on this and nothing else.

    `sha256` in hex; `python` as "3.11".
    """
    return digest_of(
        canonical_json({"wheel": sha256, "unpacker": UNPACKER, "python": python, "prefix": PREFIX})
    )


def unpack_wheel(wheel: Path, root: Path, *, python: str) -> LayerFacts:
    """Unpack a wheel below `root`, an empty directory, for `python` ("3.11"); return the facts of its layer.

    Raises: BadWheelError.
    """
    try:
        with (
            wheel.open("rb") as file,
            zipfile.ZipFile(file) as archive,
            _mapped(file.fileno()) as data,
        ):
            return _unpack(archive, data, wheel, root, python)
    except _DAMAGE as error:
        raise _bad(wheel, f"{type(error).__name__}: {error}") from error


@contextmanager
def _mapped(descriptor: int) -> Iterator[mmap.mmap]:
    """Map a file; what a failure's traceback still holds of it keeps the mapping, and hides no failure."""
    data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    try:
        yield data
    finally:
        with suppress(BufferError):
            data.close()


def _bad(wheel: Path, cause: str) -> BadWheelError:
    return BadWheelError(
        f"`{wheel.name}` is no whole wheel",
        cause=cause,
        hint="choose another version of the package in the spec",
    )


def _unpack(archive: zipfile.ZipFile, data: mmap.mmap, wheel: Path, root: Path, python: str) -> LayerFacts:
    infos = _checked_infos(archive, wheel)
    dist_info = _dist_info(infos, wheel)
    layout = _Layout(dist_info=dist_info, python=python)
    record = _read_record(archive.read(f"{dist_info}/RECORD").decode())
    members = {member.path: member for member in _members(archive, infos, layout, record)}
    record_member = _new_record(members.values(), layout)
    members[record_member.path] = record_member
    return _TreeWriter(root, data, wheel).write(members)


def _checked_infos(archive: zipfile.ZipFile, wheel: Path) -> list[zipfile.ZipInfo]:
    """Return the files of the archive; refuse what leads out of the tree or would fill the disk."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > _FILES_MAX:
        raise _bad(wheel, f"it holds {len(infos)} files")
    total, size = sum(info.file_size for info in infos), wheel.stat().st_size
    if total > size * _RATIO_MAX + _SLACK:
        raise _bad(wheel, f"{size} bytes that claim to hold {total}")
    seen: set[str] = set()
    for info in infos:
        _check_name(info.filename, wheel)
        if info.filename in seen:
            raise _bad(wheel, f"it holds `{info.filename}` twice")
        if info.flag_bits & _ENCRYPTED or info.compress_type not in {_STORED, _DEFLATED}:
            raise _bad(wheel, f"`{info.filename}` is encrypted or compressed in a way wheels are not")
        seen.add(info.filename)
    return infos


def _check_name(name: str, wheel: Path) -> None:
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in name or not name.isprintable():
        raise _bad(wheel, f"the path {name!r} leads out of the tree or cannot be a file's")
    if parts[-1].startswith(".wh."):
        raise _bad(wheel, f"the path {name!r} would mean a removal in an image")


def _dist_info(infos: Iterable[zipfile.ZipInfo], wheel: Path) -> str:
    found = {info.filename.partition("/")[0] for info in infos if info.filename.endswith(".dist-info/RECORD")}
    found = {name for name in found if name.endswith(".dist-info")}
    if len(found) != 1:
        raise _bad(wheel, f"it has {len(found)} `.dist-info` directories with a RECORD instead of one")
    return found.pop()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Where an installer puts the parts of a wheel; paths relative to the root of the tree."""

    dist_info: str
    python: str

    @property
    def site_packages(self) -> str:
        return f"{PREFIX[1:]}/lib/python{self.python}/site-packages"

    @property
    def data_prefix(self) -> str:
        return self.dist_info.removesuffix(".dist-info") + ".data/"

    @property
    def project(self) -> str:
        return self.dist_info.partition("-")[0]

    def place(self, name: str) -> tuple[str, str]:
        """Return the path of a file and its scheme ("purelib", "scripts", "headers", "data")."""
        if not name.startswith(self.data_prefix):
            return f"{self.site_packages}/{name}", "purelib"
        scheme, _, rest = name[len(self.data_prefix) :].partition("/")
        roots = {
            "purelib": self.site_packages,
            "platlib": self.site_packages,
            "scripts": f"{PREFIX[1:]}/bin",
            "headers": f"{PREFIX[1:]}/include/site/python{self.python}/{self.project}",
            "data": PREFIX[1:],
        }
        if scheme not in roots or not rest:
            raise BadWheelError(
                f"`{name}` belongs to no installation scheme", hint="choose another version of the package"
            )
        return f"{roots[scheme]}/{rest}", scheme


def _read_record(text: str) -> dict[str, tuple[str, str] | None]:
    """Return RECORD's hashes by name: (algorithm, urlsafe base64), or None where it has none."""
    record: dict[str, tuple[str, str] | None] = {}
    for row in csv.reader(text.splitlines()):
        if row:
            algorithm, _, value = row[1].partition("=") if len(row) > 1 else ("", "", "")
            record[row[0]] = (algorithm, value) if value else None
    return record


def _members(
    archive: zipfile.ZipFile,
    infos: Sequence[zipfile.ZipInfo],
    layout: _Layout,
    record: Mapping[str, tuple[str, str] | None],
) -> Iterator[_Member]:
    unhashed = {
        f"{layout.dist_info}/RECORD",
        f"{layout.dist_info}/RECORD.jws",
        f"{layout.dist_info}/RECORD.p7s",
    }
    for info in infos:
        if info.filename in unhashed or info.filename == f"{layout.dist_info}/INSTALLER":
            continue
        path, scheme = layout.place(info.filename)
        executable = bool(info.external_attr >> 16 & 0o111) and not stat.S_ISLNK(info.external_attr >> 16)
        if scheme == "scripts":
            content = archive.read(info)
            _check_hash(info.filename, content, record.get(info.filename))
            yield _made(path, _with_interpreter(content), mode=0o755)
        else:
            yield _Member(
                path=path, mode=0o755 if executable else 0o644, info=info, hash=record.get(info.filename)
            )
    yield _made(f"{layout.site_packages}/{layout.dist_info}/INSTALLER", b"mlenv\n", mode=0o644)
    if f"{layout.dist_info}/entry_points.txt" in archive.namelist():
        yield from _entry_points(archive.read(f"{layout.dist_info}/entry_points.txt").decode())


def _new_record(members: Iterable[_Member], layout: _Layout) -> _Member:
    """Return RECORD as installers write it: relative to site-packages, sorted, the wheel's hashes."""
    path = f"{layout.site_packages}/{layout.dist_info}/RECORD"
    rows = [(_relative(path, layout.site_packages), "", "")]
    for member in members:
        algorithm, value = member.hash or ("", "")
        size = len(member.content) if member.info is None else member.info.file_size
        rows.append(
            (
                _relative(member.path, layout.site_packages),
                f"{algorithm}={value}" if value else "",
                str(size) if value else "",
            )
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(sorted(rows))
    return _made(path, text.getvalue().encode(), mode=0o644)


def _relative(path: str, site_packages: str) -> str:
    return posixpath.relpath(path, site_packages)


def _made(path: str, content: bytes, *, mode: int) -> _Member:
    value = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return _Member(path=path, mode=mode, content=content, hash=("sha256", value))


def _with_interpreter(script: bytes) -> bytes:
    """Return a script with the environment's interpreter in place of `#!python`.

    Source: Binary distribution format, Installing a wheel, 2.2.
    """
    line, newline, rest = script.partition(b"\n")
    if re.match(rb"#!pythonw?(\s|$)", line):
        return b"#!" + INTERPRETER.encode() + newline + rest
    return script


def _entry_points(text: str) -> Iterator[_Member]:
    parser = configparser.ConfigParser(delimiters=("=",), strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign] # names keep their case
    parser.read_string(text)
    for section in ("console_scripts", "gui_scripts"):
        if parser.has_section(section):
            for name, value in parser.items(section):
                yield _entry_point(name, value)


def _entry_point(name: str, value: str) -> _Member:
    match = re.match(r"\s*([\w.]+)\s*:\s*([\w.]+)\s*(\[.*\])?\s*\Z", value)
    if match is None or "/" in name or name in {"", ".", ".."} or not name.isprintable():
        raise BadWheelError(
            f"the entry point `{name} = {value}` names no function",
            hint="choose another version of the package",
        )
    module, function = match[1], match[2]
    script = _SCRIPT.format(
        interpreter=INTERPRETER, module=module, first=function.partition(".")[0], callable=function
    )
    return _made(f"{PREFIX[1:]}/bin/{name}", script.encode(), mode=0o755)


def _check_hash(name: str, content: bytes, expected: tuple[str, str] | None) -> None:
    if expected is not None:
        checker = _Checker(name, expected)
        checker.update(content)
        checker.finish(hashlib.sha256(content).digest())


class _Checker:
    """Compares a file with what RECORD says of it; sha256 is computed by whoever writes the file."""

    def __init__(self, name: str, expected: tuple[str, str]) -> None:
        self._name = name
        self._algorithm, self._value = expected
        if self._algorithm not in {"sha256", "sha384", "sha512"}:
            raise BadWheelError(
                f"RECORD vouches for `{name}` with {self._algorithm}", cause="wheels need sha256 or better"
            )
        self._other = None if self._algorithm == "sha256" else hashlib.new(self._algorithm)

    def update(self, chunk: bytes) -> None:
        if self._other is not None:
            self._other.update(chunk)

    def finish(self, sha256: bytes) -> None:
        found = sha256 if self._other is None else self._other.digest()
        if base64.urlsafe_b64encode(found).rstrip(b"=") != self._value.rstrip("=").encode():
            raise BadWheelError(
                f"`{self._name}` in a wheel is not what its RECORD says",
                hint="choose another version of the package in the spec",
            )


class _TreeWriter:
    """Writes the members of one tree in the order of its tar, which is hashed on the way."""

    def __init__(self, root: Path, data: mmap.mmap, wheel: Path) -> None:
        self._root = os.fspath(root)
        self._data = data
        self._wheel = wheel
        self._layer = LayerWriter()

    def write(self, members: Mapping[str, _Member]) -> LayerFacts:
        """Write all members with the directories they need."""
        directories = _directories(members)
        for path in sorted([*members, *directories], key=os.fsencode):
            if path not in directories:
                self._add_file(members[path])
            elif path in members:
                raise _bad(self._wheel, f"`{path}` is both a file and a directory")
            else:
                os.mkdir(f"{self._root}/{path}", 0o755)  # noqa: PTH102 - hot loop
                self._layer.add(Entry(path=path, kind=b"5", mode=0o755, mtime=MTIME_ORIGIN))
        for path in sorted(directories, reverse=True):
            os.utime(f"{self._root}/{path}", (MTIME_ORIGIN, MTIME_ORIGIN))
        return self._layer.finish()

    def _add_file(self, member: _Member) -> None:
        crc = zlib.crc32(member.content) if member.info is None else member.info.CRC
        size = len(member.content) if member.info is None else member.info.file_size
        mtime = MTIME_ORIGIN + crc % (1 << 24)
        checker = None if member.hash is None else _Checker(member.path, member.hash)
        descriptor = os.open(
            f"{self._root}/{member.path}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        try:
            content = self._written(descriptor, self._content(member), checker)
            entry = Entry(path=member.path, mode=member.mode, size=size, mtime=mtime)
            sha256 = self._layer.add(entry, content)
            if checker is not None and sha256 is not None:
                checker.finish(bytes.fromhex(sha256))
            os.fchmod(descriptor, member.mode)
            os.utime(descriptor, (mtime, mtime))
        finally:
            os.close(descriptor)

    @staticmethod
    def _written(descriptor: int, chunks: Iterable[bytes], checker: _Checker | None) -> Iterator[bytes]:
        for chunk in chunks:
            write_all(descriptor, chunk)
            if checker is not None:
                checker.update(chunk)
            yield chunk

    def _content(self, member: _Member) -> Iterator[bytes]:
        if member.info is None:
            yield member.content
            return
        crc, left = 0, member.info.file_size
        for chunk in self._inflated(member.info):
            left -= len(chunk)
            if left < 0:
                raise _bad(self._wheel, f"`{member.path}` holds more bytes than it claims")
            # sha256 says it better where RECORD has one.
            crc = zlib.crc32(chunk, crc) if member.hash is None else 0
            yield chunk
        if left:
            raise _bad(self._wheel, f"`{member.path}` holds fewer bytes than it claims")
        if member.hash is None and crc != member.info.CRC:
            raise _bad(self._wheel, f"the checksum of `{member.path}` does not match")

    def _inflated(self, info: zipfile.ZipInfo) -> Iterator[bytes]:
        """Yield a file's bytes."""
        start = self._content_offset(info)
        packed = memoryview(self._data)[start : start + info.compress_size]
        try:
            if info.compress_type == _STORED:
                for offset in range(0, len(packed), _CHUNK):
                    yield bytes(packed[offset : offset + _CHUNK])
                return
            inflater = isal_zlib.decompressobj(-zlib.MAX_WBITS)
            for offset in range(0, len(packed), _CHUNK):
                rest: bytes | memoryview = packed[offset : offset + _CHUNK]
                while rest:
                    yield inflater.decompress(rest, _CHUNK)
                    rest = inflater.unconsumed_tail
            yield inflater.flush()
        finally:
            packed.release()

    def _content_offset(self, info: zipfile.ZipInfo) -> int:
        """Return where a file's content begins, behind its local header (APPNOTE 4.3.7)."""
        local = self._data[info.header_offset : info.header_offset + 30]
        if local[:4] != b"PK\3\4":
            raise _bad(self._wheel, f"`{info.filename}` has no local header")
        name_length, extra_length = (
            int.from_bytes(local[26:28], "little"),
            int.from_bytes(local[28:30], "little"),
        )
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.compress_size > len(self._data):
            raise _bad(self._wheel, f"`{info.filename}` ends behind the end of the file")
        return start


def _directories(paths: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        parent = path.rpartition("/")[0]
        while parent and parent not in found:
            found.add(parent)
            parent = parent.rpartition("/")[0]
    return found
