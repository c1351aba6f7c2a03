"""A container's log: one JSON object a line, as Docker's json-file, three files of ten megabytes.

Bytes that are no UTF-8 are kept as lone surrogates (PEP 383), so what was written comes back exactly.
"""

from __future__ import annotations

import os
import time

from mlenv.container import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "log"
FILE_SIZE = 10_000_000
FILES = 3


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


def entries(lines: Iterator[bytes]) -> Iterator[tuple[float, str, bytes]]:
    """Return (time, stream, bytes) of each complete line."""
    for line in lines:
        if line.endswith(b"\n"):
            entry = record.parse(line.decode())
            yield entry["time"], entry["stream"], entry["log"].encode(errors="surrogateescape")
