"""Messages on a container's attach socket: one byte of kind, four of length (big endian), the payload.

| kind | from   | payload                                             |
|------|--------|-----------------------------------------------------|
| h    | shim   | hello: `t` with a terminal, `p` with pipes           |
| o, e | shim   | bytes of stdout (or the terminal), of stderr         |
| x    | shim   | the exit status, one byte; the last message          |
| a    | client | attach: from now on send me the output               |
| i    | client | bytes for stdin; none at all is its end              |
| w    | client | rows and columns of the client's window, two bytes each |
| s    | client | a signal's number for the container's process        |
"""

from __future__ import annotations

import os

HELLO, STDOUT, STDERR, EXIT, ATTACH, STDIN, WINDOW, SIGNAL = b"h", b"o", b"e", b"x", b"a", b"i", b"w", b"s"
PAYLOAD_MAX = 65536
"""Longest payload in bytes; a longer one is a hostile client's."""
_HEADER = 5


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """Return a message."""
    return kind + len(payload).to_bytes(4, "big") + payload


class Reader:
    """Puts messages together from what comes in pieces."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Return the messages that are complete now. Raises: ValueError for one that is too long."""
        self._pending += data
        complete = []
        while len(self._pending) >= _HEADER:
            length = int.from_bytes(self._pending[1:_HEADER], "big")
            if length > PAYLOAD_MAX:
                raise ValueError(f"a message of {length} bytes, at most {PAYLOAD_MAX} are allowed")
            if len(self._pending) < _HEADER + length:
                break
            complete.append((self._pending[:1], self._pending[_HEADER : _HEADER + length]))
            self._pending = self._pending[_HEADER + length :]
        return complete


def window_payload(rows: int, columns: int) -> bytes:
    """Return the payload of a window's size."""
    return rows.to_bytes(2, "big") + columns.to_bytes(2, "big")


def window_size(payload: bytes) -> tuple[int, int]:
    """Return (rows, columns)."""
    return int.from_bytes(payload[:2], "big"), int.from_bytes(payload[2:4], "big")


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, waiting where the other side is slow."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            import select

            waiter = select.poll()
            waiter.register(descriptor, select.POLLOUT)
            waiter.poll()
