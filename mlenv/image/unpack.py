"""Layers the other way: a tar as a tree in overlay's form, never writing outside of it.

Source: OCI image-spec, layer.md (whiteouts); POSIX pax(1), ustar and pax formats; GNU tar manual, Basic Tar
Format.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from mlenv.errors import ImageError
from mlenv.image.layer import (
    BLOCK,
    BLOCK_DEVICE,
    CHAR,
    CHUNK,
    DIRECTORY,
    FIFO,
    KEPT_XATTRS,
    LINK,
    OPAQUE,
    OPAQUE_XATTRS,
    PAX_XATTR,
    REGULAR,
    SYMLINK,
    WHITEOUT,
    Entry,
    write_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

_OPEN_DIRECTORIES_MAX = 200
"""Far below the usual limit of 1024 descriptors."""


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
            chunk = self._read(min(self._left, CHUNK))
            if not chunk:
                raise _early_end()
            self._left -= len(chunk)
            yield chunk

    def all(self) -> bytes:
        if self._left > CHUNK:
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
    kind = block[156:157].replace(b"\0", REGULAR).replace(b"7", REGULAR)
    if kind == REGULAR and name.endswith(b"/"):
        kind = DIRECTORY
    size = int(overrides["size"]) if "size" in overrides else _number(block[124:136])
    entry = Entry(
        path=os.fsdecode(name),
        kind=kind,
        mode=_number(block[100:108]) & 0o7777,
        size=size if kind == REGULAR else 0,
        mtime=int(float(overrides["mtime"])) if "mtime" in overrides else _number(block[136:148]),
        link=os.fsdecode(link),
        device=(_number(block[329:337]), _number(block[337:345])) if kind in {CHAR, BLOCK_DEVICE} else (0, 0),
        xattrs={
            key[len(PAX_XATTR) :]: value for key, value in overrides.items() if key.startswith(PAX_XATTR)
        },
    )
    return entry, 0 if kind in {LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO} else size


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
            if entry.kind == LINK:
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
    types = {CHAR: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK, FIFO: stat.S_IFIFO}
    try:
        os.mknod(name, entry.mode | types[entry.kind], os.makedev(*entry.device), dir_fd=parent)
    except PermissionError:
        # Only root makes device nodes; a container gets its own /dev, so an image without them is whole.
        if entry.kind == FIFO:
            raise
        return
    os.chmod(name, entry.mode, dir_fd=parent)
    os.utime(name, (entry.mtime, entry.mtime), dir_fd=parent)


def _set_xattrs(descriptor: int, entry: Entry) -> None:
    for name, value in entry.xattrs.items():
        # Without root a capability cannot be set, and without other ids in the container it would give
        # nothing.
        if name == "security.capability" and os.geteuid() != 0:
            continue
        if name.startswith(KEPT_XATTRS) and not name.startswith("user.overlay."):
            os.setxattr(descriptor, name, value)
