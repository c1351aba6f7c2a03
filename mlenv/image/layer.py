"""Layers: a tree as one canonical tar.

The writer gives equal trees equal bytes: entries sorted by their path as bytes, owner 0:0 without names,
times in whole seconds, ustar headers with PAX records only where ustar cannot say it, the first path of a
hard-linked file as its file. Overlay's forms of "removed" and "opaque" become `.wh.` entries, and back again.

Source: OCI image-spec, layer.md (whiteouts); POSIX pax(1), ustar and pax formats; Linux
Documentation/filesystems/overlayfs.rst (whiteouts are character devices 0:0, opaque directories carry an
xattr).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlenv.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

BLOCK = 512
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
OPAQUE_XATTRS = ("trusted.overlay.opaque", "user.overlay.opaque")

CHUNK = 1 << 20
_USTAR_MAX = 8 << 30
KEPT_XATTRS = ("security.capability", "user.")
PAX_XATTR = "SCHILY.xattr."
REGULAR, LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One member of a tar: `path` without slashes at its ends; `mtime` in seconds; `size` in bytes."""

    path: str
    kind: bytes = REGULAR
    mode: int = 0o644
    size: int = 0
    mtime: int = 0
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_file(self) -> bool:
        """Whether content follows."""
        return self.kind == REGULAR

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == DIRECTORY


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFacts:
    """What one reading of a tree tells: digest and size of its tar, its files, their bytes, its index."""

    diff_id: str
    tar_size: int
    size: int
    files: int
    index: bytes

    @property
    def meta(self) -> dict[str, Any]:
        """Return what the store keeps in `meta.json`."""
        return {"diff_id": self.diff_id, "tar_size": self.tar_size, "size": self.size, "files": self.files}


# --- writing


class LayerWriter:
    """Writes a canonical tar and learns its facts; entries must come sorted by path as bytes."""

    def __init__(self, write: Callable[[bytes], object] | None = None) -> None:
        self._write = write
        self._tar = hashlib.sha256()
        self._tar_size = 0
        self._size = 0
        self._files = 0
        self._index: list[bytes] = []
        self._last = b""

    def add(self, entry: Entry, content: Iterable[bytes] = ()) -> str | None:
        """Add one entry with its content; return the sha256 (hex) of a file's content."""
        path = os.fsencode(entry.path)
        if path <= self._last:
            raise ImageError(f"layer entries out of order: {entry.path!r}")
        self._last = path
        self._put(header(entry))
        return self._add_content(path, entry, content) if entry.is_file else None

    def _add_content(self, path: bytes, entry: Entry, content: Iterable[bytes]) -> str:
        sha256, size = hashlib.sha256(), 0
        for chunk in content:
            size += len(chunk)
            sha256.update(chunk)
            self._put(chunk)
        if size != entry.size:
            raise ImageError(
                f"`{entry.path}` changed while it was read: {size} bytes instead of {entry.size}"
            )
        self._put(b"\0" * (-size % BLOCK))
        self._size += size
        self._files += 1
        self._index.append(sha256.hexdigest().encode() + b" " + path + b"\0")
        return sha256.hexdigest()

    def _put(self, data: bytes) -> None:
        self._tar.update(data)
        self._tar_size += len(data)
        if self._write is not None:
            self._write(data)

    def finish(self) -> LayerFacts:
        """End the tar and return its facts."""
        self._put(b"\0" * (2 * BLOCK))
        return LayerFacts(
            diff_id="sha256:" + self._tar.hexdigest(),
            tar_size=self._tar_size,
            size=self._size,
            files=self._files,
            index=b"".join(self._index),
        )


def write_layer(roots: Sequence[Path], write: Callable[[bytes], object] | None = None) -> LayerFacts:
    """Write the tar of one tree, or of several over each other (the last on top); return its facts."""
    members = _merged([tree_entries(root) for root in roots])
    writer = LayerWriter(write)
    for entry, source in members:
        writer.add(entry, _content(source) if entry.is_file else ())
    return writer.finish()


def _merged(trees: Sequence[Iterable[tuple[Entry, str]]]) -> list[tuple[Entry, str]]:
    """Lay entries over each other: a later path replaces an earlier one, a file also what was below it."""
    if len(trees) == 1:
        return list(trees[0])
    merged: dict[str, tuple[Entry, str]] = {}
    for tree in trees:
        for entry, source in tree:
            below = merged.get(entry.path)
            if below is not None and below[0].is_directory and not entry.is_directory:
                merged = {
                    path: each for path, each in merged.items() if not path.startswith(entry.path + "/")
                }
            merged[entry.path] = (entry, source)
    return sorted(merged.values(), key=lambda member: os.fsencode(member[0].path))


def _content(path: str) -> Iterator[bytes]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while chunk := os.read(descriptor, CHUNK):
            yield chunk
    finally:
        os.close(descriptor)


def tree_entries(root: Path) -> list[tuple[Entry, str]]:
    """Return every entry of a tree in overlay's form with its host path, sorted as the tar wants them.

    Raises: ImageError where the tree holds what no layer can say.
    """
    found: list[tuple[str, str, os.stat_result]] = []
    _walk(os.fspath(root), "", found)
    found.sort(key=lambda item: os.fsencode(item[0]))
    first_paths: dict[tuple[int, int], str] = {}
    entries: list[tuple[Entry, str]] = []
    for path, source, status in found:
        entry = _entry(path, source, status, first_paths)
        if entry is not None:
            # A whiteout is an empty file in the layer, and a device on the disk.
            is_empty = entry.is_file and not stat.S_ISREG(status.st_mode)
            entries.append((entry, os.devnull if is_empty else source))
        if stat.S_ISDIR(status.st_mode) and _is_opaque(source):
            entries.append((Entry(path=f"{path}/{OPAQUE}"), os.devnull))
    entries.sort(key=lambda item: os.fsencode(item[0].path))
    return entries


def _walk(directory: str, prefix: str, found: list[tuple[str, str, os.stat_result]]) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            path = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            found.append((path, entry.path, status))
            if stat.S_ISDIR(status.st_mode):
                _walk(entry.path, path + "/", found)


def _entry(path: str, source: str, status: os.stat_result, first: dict[tuple[int, int], str]) -> Entry | None:
    parent, _, name = path.rpartition("/")
    if name.startswith(WHITEOUT):
        raise ImageError(
            f"`{path}` cannot be in an image", cause=f"names that begin with `{WHITEOUT}` mean a removal"
        )
    mode, mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        return Entry(path=f"{parent}/{WHITEOUT}{name}" if parent else WHITEOUT + name)
    if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
        target = first.setdefault((status.st_dev, status.st_ino), path)
        if target != path:
            return Entry(path=path, kind=LINK, mode=mode, mtime=mtime, link=target)
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is None:  # a socket: nothing that was stored can listen on it
        return None
    device = (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in {CHAR, BLOCK_DEVICE} else (0, 0)
    return Entry(
        path=path,
        kind=kind,
        mode=0o777 if kind == SYMLINK else mode,
        size=status.st_size if kind == REGULAR else 0,
        mtime=mtime,
        link=os.readlink(source) if kind == SYMLINK else "",  # noqa: PTH115 - hot loop
        device=device,
        xattrs=_xattrs(source),
    )


_KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFCHR: CHAR,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFIFO: FIFO,
}


def _xattrs(source: str) -> dict[str, bytes]:
    kept = {}
    for name in sorted(os.listxattr(source, follow_symlinks=False)):
        if name.startswith(("user.overlay.", "trusted.")) or not name.startswith(KEPT_XATTRS):
            continue
        value = os.getxattr(source, name, follow_symlinks=False)
        kept[name] = _root_capability(value) if name == "security.capability" else value
    return kept


def _root_capability(value: bytes) -> bytes:
    """Return a file capability as root of the machine would have set it.

    A capability set inside a user namespace is stored as revision 3, with the namespace's root uid at its
    end.
    Source: capabilities(7), File capability extended attribute versioning.
    """
    revision_3, length_3 = 0x03000000, 24
    magic = int.from_bytes(value[:4], "little")
    if magic & 0xFF000000 == revision_3 and len(value) == length_3:
        return (magic & 0x00FFFFFF | 0x02000000).to_bytes(4, "little") + value[4:20]
    return value


def _is_opaque(source: str) -> bool:
    for name in OPAQUE_XATTRS:
        try:
            if os.getxattr(source, name, follow_symlinks=False) == b"y":
                return True
        except OSError as error:
            if error.errno not in {errno.ENODATA, errno.ENOTSUP, errno.EPERM}:
                raise
    return False


def header(entry: Entry) -> bytes:
    """Return the header blocks of an entry: ustar, behind a PAX header where ustar is not enough."""
    name = os.fsencode(entry.path) + (b"/" if entry.is_directory else b"")
    link = os.fsencode(entry.link)
    records: dict[str, bytes] = {PAX_XATTR + key: value for key, value in entry.xattrs.items()}
    prefix, short = _split(name)
    if short is None:
        records["path"] = name
        prefix, short = b"", name[:100]
    if len(link) > 100 or not link.isascii():  # noqa: PLR2004 - ustar's field
        records["linkpath"] = link
    if entry.size >= _USTAR_MAX:
        records["size"] = str(entry.size).encode()
    pax = _pax_header(records) if records else b""
    size = 0 if entry.size >= _USTAR_MAX else entry.size
    return pax + _ustar(prefix, short, entry, size, link[:100])


def _split(name: bytes) -> tuple[bytes, bytes | None]:
    """Return ustar's (prefix, name); the name is None where they cannot hold the path."""
    if not name.isascii():
        return b"", None
    if len(name) <= 100:  # noqa: PLR2004
        return b"", name
    cut = name.find(b"/", max(len(name) - 101, 0), len(name) - 1)
    if 0 < cut <= 155:  # noqa: PLR2004
        return name[:cut], name[cut + 1 :]
    return b"", None


def _pax_header(records: Mapping[str, bytes]) -> bytes:
    body = b"".join(_pax_record(key.encode(), records[key]) for key in sorted(records))
    entry = Entry(path="pax", kind=b"x", size=len(body))
    return _ustar(b"", b"PaxHeader", entry, len(body), b"") + body + b"\0" * (-len(body) % BLOCK)


def _pax_record(key: bytes, value: bytes) -> bytes:
    """Return "LENGTH KEY=VALUE" and a newline; the length counts itself."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _ustar(prefix: bytes, name: bytes, entry: Entry, size: int, link: bytes) -> bytes:
    block = b"".join(
        (
            name.ljust(100, b"\0"),
            b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (entry.mode & 0o7777, 0, 0, size, max(entry.mtime, 0)),
            b"        ",
            entry.kind,
            link.ljust(100, b"\0"),
            b"ustar\x0000",
            b"\0" * 64,
            b"%07o\0%07o\0" % entry.device,
            prefix.ljust(155, b"\0"),
            b"\0" * 12,
        )
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`; write(2) may take less at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
