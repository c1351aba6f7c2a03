"""Layers: a tree as one canonical tar, and a tar as a tree.

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
from contextlib import closing, suppress
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

_CHUNK = 1 << 20
_OPEN_DIRECTORIES_MAX = 200  # far below the usual limit of 1024 descriptors
_USTAR_MAX = 8 << 30
_KEPT_XATTRS = ("security.capability", "user.")
_PAX_XATTR = "SCHILY.xattr."
_REGULAR, _LINK, _SYMLINK, _CHAR, _BLOCK_DEVICE, _DIRECTORY, _FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One member of a tar: `path` without slashes at its ends; `mtime` in seconds; `size` in bytes."""

    path: str
    kind: bytes = _REGULAR
    mode: int = 0o644
    size: int = 0
    mtime: int = 0
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_file(self) -> bool:
        """Whether content follows."""
        return self.kind == _REGULAR

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == _DIRECTORY


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
        while chunk := os.read(descriptor, _CHUNK):
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
            entries.append((entry, source))
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
            return Entry(path=path, kind=_LINK, mode=mode, mtime=mtime, link=target)
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is None:  # a socket: nothing that was stored can listen on it
        return None
    device = (
        (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in {_CHAR, _BLOCK_DEVICE} else (0, 0)
    )
    return Entry(
        path=path,
        kind=kind,
        mode=0o777 if kind == _SYMLINK else mode,
        size=status.st_size if kind == _REGULAR else 0,
        mtime=mtime,
        link=os.readlink(source) if kind == _SYMLINK else "",  # noqa: PTH115 - hot loop
        device=device,
        xattrs=_xattrs(source),
    )


_KINDS = {
    stat.S_IFREG: _REGULAR,
    stat.S_IFLNK: _SYMLINK,
    stat.S_IFDIR: _DIRECTORY,
    stat.S_IFCHR: _CHAR,
    stat.S_IFBLK: _BLOCK_DEVICE,
    stat.S_IFIFO: _FIFO,
}


def _xattrs(source: str) -> dict[str, bytes]:
    kept = {}
    for name in sorted(os.listxattr(source, follow_symlinks=False)):
        if name.startswith(("user.overlay.", "trusted.")) or not name.startswith(_KEPT_XATTRS):
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
    records: dict[str, bytes] = {_PAX_XATTR + key: value for key, value in entry.xattrs.items()}
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


# --- reading


def read_entries(read: Callable[[int], bytes]) -> Iterator[tuple[Entry, Iterator[bytes]]]:
    """Read a tar (ustar, pax, GNU): each entry with its content, which is gone when the next is read.

    Raises: ImageError where it is damaged or ends early.
    """
    overrides: dict[str, bytes] = {}
    while True:
        block = _exactly(read, BLOCK)
        if block.count(0) == BLOCK:
            return
        entry, size = _parse(block, overrides)
        content = _Content(read, size)
        match entry.kind:
            case b"x":
                overrides.update(_pax_records(content.all()))
                continue
            case b"g":
                content.all()
                continue
            case b"L" | b"K":
                overrides["path" if entry.kind == b"L" else "linkpath"] = content.all().rstrip(b"\0")
                continue
            case _:
                yield entry, iter(content)
        content.skip()
        overrides = {}


class _Content:
    """The bytes behind a header, up to the next one."""

    def __init__(self, read: Callable[[int], bytes], size: int) -> None:
        self._read = read
        self._left = size
        self._padding = -size % BLOCK

    def __iter__(self) -> Iterator[bytes]:
        while self._left:
            chunk = self._read(min(self._left, _CHUNK))
            if not chunk:
                raise _early_end()
            self._left -= len(chunk)
            yield chunk

    def all(self) -> bytes:
        if self._left > _CHUNK:
            raise ImageError("a tar has a header of more than 1 MiB")
        content = b"".join(self)
        self.skip()
        return content

    def skip(self) -> None:
        for _ in self:
            pass
        _exactly(self._read, self._padding)
        self._padding = 0


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        chunk = read(size)
        if not chunk:
            raise _early_end()
        parts.append(chunk)
        size -= len(chunk)
    return b"".join(parts)


def _early_end() -> ImageError:
    return ImageError("a tar ends in the middle of an entry", hint="run the command again to fetch it anew")


def _parse(block: bytes, overrides: Mapping[str, bytes]) -> tuple[Entry, int]:
    checksum = sum(block[:148]) + 8 * 0x20 + sum(block[156:])
    if _number(block[148:156]) != checksum:
        raise ImageError("a tar is damaged", cause="the checksum of a header does not match")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = _text(block[345:500]) + b"/" + name
    name = overrides.get("path", name)
    link = overrides.get("linkpath", _text(block[157:257]))
    kind = block[156:157].replace(b"\0", _REGULAR).replace(b"7", _REGULAR)
    if kind == _REGULAR and name.endswith(b"/"):
        kind = _DIRECTORY
    size = int(overrides["size"]) if "size" in overrides else _number(block[124:136])
    entry = Entry(
        path=os.fsdecode(name),
        kind=kind,
        mode=_number(block[100:108]) & 0o7777,
        size=size if kind == _REGULAR else 0,
        mtime=int(float(overrides["mtime"])) if "mtime" in overrides else _number(block[136:148]),
        link=os.fsdecode(link),
        device=(_number(block[329:337]), _number(block[337:345]))
        if kind in {_CHAR, _BLOCK_DEVICE}
        else (0, 0),
        xattrs={
            key[len(_PAX_XATTR) :]: value for key, value in overrides.items() if key.startswith(_PAX_XATTR)
        },
    )
    return entry, 0 if kind in {_LINK, _SYMLINK, _CHAR, _BLOCK_DEVICE, _DIRECTORY, _FIFO} else size


def _text(value: bytes) -> bytes:
    return value.partition(b"\0")[0]


def _number(value: bytes) -> int:
    """Read ustar's octal or GNU's base-256 number."""
    if value[0] & 0x80:
        return int.from_bytes(bytes([value[0] & 0x7F]) + value[1:], "big")
    digits = value.replace(b"\0", b" ").split()
    try:
        return int(digits[0], 8) if digits else 0
    except ValueError as error:
        raise ImageError("a tar is damaged", cause=f"{value!r} is not a number") from error


def _pax_records(body: bytes) -> dict[str, bytes]:
    records = {}
    while body:
        length_text, _, _ = body.partition(b" ")
        if not length_text.isdigit() or not len(length_text) < int(length_text) <= len(body):
            raise ImageError("a tar is damaged", cause="a pax record has an impossible length")
        record = body[len(length_text) + 1 : int(length_text) - 1]
        body = body[int(length_text) :]
        key, _, value = record.partition(b"=")
        records[key.decode(errors="surrogateescape")] = value
    return records


def unpack_layer(
    read: Callable[[int], bytes], root: Path, *, rename: Callable[[str], str] | None = None
) -> None:
    """Unpack a tar below `root` in overlay's form; nothing outside it is ever touched.

    Owners are dropped (everything belongs to the caller), devices are skipped where the caller may not make
    them, and entries may come in any order. `rename` maps each path before it is used.

    Raises: ImageError on `..`, absolute paths, and entries below something that is no directory.
    """
    with closing(_Unpacker(root)) as unpacker:
        for entry, content in read_entries(read):
            path, target = _clean(entry.path), ""
            if entry.kind == _LINK:
                target = _clean(entry.link)
            if rename is not None:
                path, target = rename(path), rename(target)
            if path:
                unpacker.put(path, entry, content, target)
        unpacker.finish()


def _clean(path: str) -> str:
    """Return a member's path without `.` parts; "" for the root itself.

    Raises: ImageError where it leads out of the tree.
    """
    parts = [part for part in path.split("/") if part not in {"", "."}]
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise ImageError(f"a layer wants to write to {path!r}", cause="the path leads out of the image")
    return "/".join(parts)


class _Unpacker:
    """Writes entries below one directory through descriptors, never through a link."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: dict[str, int] = {}
        self._directories: dict[str, Entry] = {}

    def close(self) -> None:
        self._forget()
        os.close(self._root)

    def _forget(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _parent(self, path: str) -> tuple[int, str]:
        """Return a descriptor of the directory of a path, made where it is missing, and its last part."""
        directory, _, name = path.rpartition("/")
        return self._directory(directory), name

    def _directory(self, path: str) -> int:
        if not path:
            return self._root
        if path in self._open:
            return self._open[path]
        above, _, name = path.rpartition("/")
        above_fd = self._directory(above)
        with suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=above_fd)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._open[path] = os.open(name, flags, dir_fd=above_fd)
        except OSError as error:
            if error.errno not in {errno.ELOOP, errno.ENOTDIR}:
                raise
            raise ImageError(
                f"a layer wants to write below `{path}`", cause="it is a link or a file, not a directory"
            ) from error
        return self._open[path]

    def put(self, path: str, entry: Entry, content: Iterable[bytes], target: str) -> None:
        """Make one entry in place of what had its path; `target` is what a hard link leads to."""
        if len(self._open) > _OPEN_DIRECTORIES_MAX:
            self._forget()
        parent, name = self._parent(path)
        if name == OPAQUE:
            _set_opaque(parent)
        elif name.startswith(WHITEOUT):
            self._put_whiteout(parent, name[len(WHITEOUT) :])
        elif entry.is_directory:
            self._put_directory(parent, name, path, entry)
        else:
            _clear(parent, name, path)
            self._put_other(parent, name, entry, content, target)

    def _put_other(self, parent: int, name: str, entry: Entry, content: Iterable[bytes], target: str) -> None:
        match entry.kind:
            case b"0":
                _put_file(parent, name, entry, content)
            case b"1":
                source, source_name = self._parent(target)
                _put_link(source, source_name, parent, name, target)
            case b"2":
                os.symlink(entry.link, name, dir_fd=parent)
                os.utime(name, (entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)
            case b"3" | b"4" | b"6":
                _put_node(parent, name, entry)
            case _:
                raise ImageError(f"`{entry.path}` in a layer is of the unknown type {entry.kind!r}")

    def _put_whiteout(self, parent: int, name: str) -> None:
        if name in {"", ".", ".."} or name.startswith(WHITEOUT):
            raise ImageError(f"a layer removes the impossible name {name!r}")
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent)
            return
        # The same layer may bring a new entry of this name: it hides the old one, a directory also all below
        # it.
        if stat.S_ISDIR(status.st_mode):
            _set_opaque_at(parent, name)

    def _put_directory(self, parent: int, name: str, path: str, entry: Entry) -> None:
        if _is_whiteout(parent, name):
            os.unlink(name, dir_fd=parent)
            os.mkdir(name, 0o755, dir_fd=parent)
            _set_opaque_at(parent, name)
        _set_xattrs(self._directory(path), entry)
        self._directories[path] = entry

    def finish(self) -> None:
        """Set the directories' modes and times, deepest first, when nothing more comes below them."""
        for path in sorted(self._directories, reverse=True):
            entry = self._directories[path]
            descriptor = self._directory(path)
            os.utime(descriptor, (entry.mtime, entry.mtime))
            os.fchmod(descriptor, entry.mode)
            os.close(self._open.pop(path))


def _set_opaque(descriptor: int) -> None:
    """Mark a directory as hiding everything below it, in the form that root's or a user's overlay reads."""
    try:
        os.setxattr(descriptor, OPAQUE_XATTRS[0], b"y")
    except PermissionError:
        os.setxattr(descriptor, OPAQUE_XATTRS[1], b"y")


def _set_opaque_at(parent: int, name: str) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        _set_opaque(descriptor)
    finally:
        os.close(descriptor)


def _is_whiteout(parent: int, name: str) -> bool:
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _clear(parent: int, name: str, path: str) -> None:
    """Remove what an entry replaces."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except IsADirectoryError as error:
        raise ImageError(f"a layer holds `{path}` both as a directory and as something else") from error


def _put_file(parent: int, name: str, entry: Entry, content: Iterable[bytes]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        for chunk in content:
            write_all(descriptor, chunk)
        os.fchmod(descriptor, entry.mode)
        _set_xattrs(descriptor, entry)
        os.utime(descriptor, (entry.mtime, entry.mtime))
    finally:
        os.close(descriptor)


def _put_link(source: int, source_name: str, parent: int, name: str, target: str) -> None:
    try:
        status = os.stat(source_name, dir_fd=source, follow_symlinks=False)
    except FileNotFoundError as error:
        raise ImageError(f"a layer has a hard link to `{target}`, which it does not hold") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"a layer has a hard link to `{target}`, which is a directory")
    os.link(source_name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)


def _put_node(parent: int, name: str, entry: Entry) -> None:
    types = {_CHAR: stat.S_IFCHR, _BLOCK_DEVICE: stat.S_IFBLK, _FIFO: stat.S_IFIFO}
    try:
        os.mknod(name, entry.mode | types[entry.kind], os.makedev(*entry.device), dir_fd=parent)
    except PermissionError:
        # Only root makes device nodes; a container gets its own /dev, so an image without them is whole.
        if entry.kind == _FIFO:
            raise


def _set_xattrs(descriptor: int, entry: Entry) -> None:
    for name, value in entry.xattrs.items():
        # Without root a capability cannot be set, and without other ids in the container it would give
        # nothing.
        if name == "security.capability" and os.geteuid() != 0:
            continue
        if name.startswith(_KEPT_XATTRS) and not name.startswith("user.overlay."):
            os.setxattr(descriptor, name, value)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`; write(2) may take less at once."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
