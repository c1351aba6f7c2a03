"""A container's log: one JSON object a line, as Docker's json-file, three files of ten megabytes.

Bytes that are no UTF-8 are kept as lone surrogates (PEP 383), so what was written comes back exactly.
"""

from __future__ import annotations

import os
import time

from mlenv.container import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import BinaryIO

NAME = "log"
FILE_SIZE = 10_000_000
FILES = 3
_CHUNK = 1 << 20


class Log:
    """The writing side; a full disk loses log lines, never the container."""

    __slots__ = ("_fd", "_path", "_size", "lost")

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, NAME)
        self.lost = 0
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def write(self, stream: str, data: bytes) -> None:
        """Append what came from `stream`; `lost` counts the bytes that found no room."""
        line = record.serialise(
            {"log": data.decode(errors="surrogateescape"), "stream": stream, "time": round(time.time(), 6)}
        )
        try:
            if self._size + len(line) > FILE_SIZE and self._size:
                self._rotate()
            written = os.write(self._fd, line)
        except OSError:
            self.lost += len(data)
            return
        if written < len(line):  # the disk is full in the middle of a line: take the piece back
            os.ftruncate(self._fd, self._size)
            self.lost += len(data)
            return
        self._size += len(line)

    def _rotate(self) -> None:
        os.close(self._fd)
        for number in range(FILES - 2, -1, -1):
            source = f"{self._path}.{number}" if number else self._path
            if os.path.exists(source):
                os.rename(source, f"{self._path}.{number + 1}")
        self._open()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def files(directory: str) -> list[str]:
    """Return the log's files, oldest first."""
    path = os.path.join(directory, NAME)
    names = [*(f"{path}.{number}" for number in range(FILES - 1, 0, -1)), path]
    return [name for name in names if os.path.exists(name)]


def entries(lines: Iterable[bytes]) -> Iterator[tuple[float, str, bytes]]:
    """Return (time, stream, bytes) of each complete line."""
    for line in lines:
        if line.endswith(b"\n"):
            entry = record.parse(line.decode())
            yield entry["time"], entry["stream"], entry["log"].encode(errors="surrogateescape")


class Lines:
    """The reading side of a log: where it has got to, over rotations."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = os.path.join(directory, NAME)
        self._pending = b""
        self._file = self._open()

    def _open(self) -> BinaryIO | None:
        try:
            return open(self._path, "rb")
        except FileNotFoundError:  # it has never been started
            return None

    def read_all(self) -> Iterator[tuple[float, str, bytes]]:
        """Yield every entry that is there, older files first; `read_more` goes on behind it."""
        for name in files(self._directory)[:-1]:
            with open(name, "rb") as older:
                yield from entries(iter(older))
        yield from self.read_more()

    def read_more(self) -> Iterator[tuple[float, str, bytes]]:
        """Yield the entries written since the last call."""
        if self._file is None:
            self._file = self._open()
        if self._file is None:
            return
        while chunk := self._file.read(_CHUNK):
            lines, newline, self._pending = (self._pending + chunk).rpartition(b"\n")
            if newline:
                yield from entries(line + b"\n" for line in lines.split(b"\n"))

    def wait(self, is_over: Callable[[], bool]) -> bool:
        """Wait for more to read; False once the container has ended and all has been read.

        `is_over` says whether it has ended, after a short wait.
        """
        return self._has_more() or not is_over() or self._has_more()

    def _has_more(self) -> bool:
        if self._file is None:
            return False
        if os.fstat(self._file.fileno()).st_size > self._file.tell():
            return True
        if not os.path.exists(self._path) or os.path.samestat(
            os.stat(self._path), os.fstat(self._file.fileno())
        ):
            return False
        self._file.close()  # it was rotated away and has been read to its end
        self._file = self._open()
        return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def last_lines(entries: Sequence[tuple[float, str, bytes]], tail: int | None) -> Iterator[tuple[str, bytes]]:
    """Yield the entries' bytes, of the last `tail` lines only."""
    pieces = [(stream, line) for _, stream, data in entries for line in data.splitlines(keepends=True)]
    if tail is not None:
        start_at = len(pieces)
        missing = tail
        while start_at and (missing or not pieces[start_at - 1][1].endswith(b"\n")):
            start_at -= 1
            missing -= bool(pieces[start_at][1].endswith(b"\n")) or start_at == len(pieces) - 1
            if missing < 0:
                start_at += 1
                break
        pieces = pieces[start_at:]
    yield from pieces
