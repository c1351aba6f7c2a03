"""The client's side of a container's attach socket: our terminal or streams against the shim's."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import _socket
import os
import select

from mlenv.container import frames
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CHUNK = 32768
_DETACH = b"\x10\x11"
"""Ctrl-P Ctrl-Q."""
_PASSED_ON = (
    _signal.SIGINT,
    _signal.SIGTERM,
    _signal.SIGHUP,
    _signal.SIGQUIT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
)


class DetachKeys:
    """Finds Ctrl-P Ctrl-Q in what is typed, also when it comes in two reads."""

    __slots__ = ("_held", "detached")

    def __init__(self) -> None:
        self._held = b""
        self.detached = False

    def filter(self, data: bytes) -> bytes:
        """Return what is to be passed on; a Ctrl-P is held back until the next key is known."""
        data = self._held + data
        self._held = b""
        position = data.find(_DETACH)
        if position >= 0:
            self.detached = True
            return data[:position]
        if data.endswith(_DETACH[:1]):
            self._held = data[-1:]
            data = data[:-1]
        return data


def connect(path: str) -> _socket.socket:
    """Return a connection to a shim. Raises: OSError where none listens."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


class Session:
    """One attachment; `run` returns the exit status, or None after the detach keys."""

    def __init__(self, connection: _socket.socket, *, stdin: bool, output: bool = True) -> None:
        self._connection = connection
        self._stdin = stdin
        self._output = output
        self._reader = frames.Reader()
        self._keys = DetachKeys()
        self._terminal = False
        self._attributes: list[Any] | None = None
        self.status: int | None = None

    def run(self) -> int | None:
        """Carry streams until the container ends or the person leaves.

        Raises: ContainerError if the shim is lost.
        """
        handlers = {}
        try:
            if self._output:
                self._send(frames.ATTACH)
                for number in _PASSED_ON:
                    handlers[number] = _signal.signal(number, self._pass_signal)
            return self._carry()
        finally:
            for number, handler in handlers.items():
                _signal.signal(number, handler)
            self._restore()
            self._connection.close()

    def _carry(self) -> int | None:
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        if self._stdin:
            poll.register(0, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == 0:
                    if not self._take_input():
                        poll.unregister(0)
                elif not self._take_messages():
                    return self._end()
            if self._keys.detached:
                return None

    def _end(self) -> int:
        if self.status is None:
            raise ContainerError(
                "the connection to the container was lost", cause="its shim ended without an exit status"
            )
        return self.status

    def _take_messages(self) -> bool:
        try:
            data = self._connection.recv(_CHUNK)
        except ConnectionResetError:  # the shim ended with a message of ours unread; all of its own was read
            return False
        if not data:
            return False
        for kind, payload in self._reader.feed(data):
            if kind == frames.HELLO:
                self._greet(terminal=payload == b"t")
            elif kind == frames.STDOUT and self._output:
                frames.write_all(1, payload)
            elif kind == frames.STDERR and self._output:
                frames.write_all(2, payload)
            elif kind == frames.EXIT:
                self.status = payload[0]
        return True

    def _greet(self, *, terminal: bool) -> None:
        self._terminal = terminal
        if terminal and self._output and os.isatty(0):
            from mlenv.container import terminal as our_terminal

            if self._stdin:
                self._attributes = our_terminal.make_raw(0)
            self._resize(0, None)
            _signal.signal(_signal.SIGWINCH, self._resize)

    def _take_input(self) -> bool:
        try:
            data = os.read(0, _CHUNK)
        except OSError:
            data = b""
        if not data:
            self._send(frames.STDIN)
            return False
        if self._terminal:
            data = self._keys.filter(data)
        if data:
            self._send(frames.STDIN, data)
        return True

    def _pass_signal(self, number: int, _frame: object) -> None:
        self._send(frames.SIGNAL, bytes((number,)))

    def _resize(self, _number: int, _frame: object) -> None:
        from mlenv.container import terminal as our_terminal

        self._send(frames.WINDOW, frames.window_payload(*our_terminal.window_size(0)))

    def _send(self, kind: bytes, payload: bytes = b"") -> None:
        try:
            self._connection.sendall(frames.frame(kind, payload), _socket.MSG_NOSIGNAL)
        except OSError:  # the shim has said its last; what it said is read next
            return

    def _restore(self) -> None:
        if self._attributes is not None:
            from mlenv.container import terminal as our_terminal

            our_terminal.restore(0, self._attributes)
