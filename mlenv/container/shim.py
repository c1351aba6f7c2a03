"""The one process that stays with a container: its parent, its terminal or pipes, its log, its attach socket.

It starts the container, tells whoever asked for it through a pipe, serves until PID 1 ends, removes
everything around it and writes down how it ended. If whoever asked is gone before the container runs,
nothing is left.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import _socket
import gc
import os
import select
import sys
import time

from mlenv.container import bundle as bundles
from mlenv.container import frames, process, record, state, surroundings
from mlenv.container.logfile import Log
from mlenv.errors import MlenvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from mlenv.container.forward import Listener

_CHUNK = 32768
_CLIENT_BUFFER_MAX = 1 << 20
"""Bytes kept for a client that does not read; the first one then slows the container, a later one loses
output."""
_STDIN_BUFFER_MAX = 1 << 18
_REPLAY_MAX = 1 << 14
"""Bytes of a terminal's latest output that a new client sees at once."""
_GOODBYE_DEADLINE = 5.0
"""Seconds that a client has to take the last output."""
_PASSED_ON = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGQUIT)
_SO_PEERCRED_SIZE = 12


def main(arguments: Sequence[str]) -> int:
    """Be the shim of the container in the directory `arguments[0]`.

    Further arguments: the socket's path, the descriptor for the answer, that of the first client or -1,
    `interactive` or `-`.
    """
    directory, socket_path, answer_fd, client_fd, interactive = arguments
    os.setsid()
    os.chdir("/")
    shim = Shim(directory, socket_path, interactive=interactive == "interactive")
    if int(client_fd) >= 0:
        shim.add_client(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, int(client_fd)), first=True)
    try:
        shim.start()
    except BaseException as error:  # noqa: BLE001 - whoever asked is told
        shim.give_up()
        _answer(int(answer_fd), _failure(error))
        return 125
    if not _answer(int(answer_fd), {"ok": True}):
        shim.abort()
    shim.serve()
    return 0


def _failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, MlenvError):
        return {
            "message": error.message,
            "cause": error.cause,
            "hint": error.hint,
            "status": error.exit_status,
            "code": error.code,
        }
    return {
        "message": "the container could not be started",
        "cause": f"{type(error).__name__}: {error}",
        "status": 125,
    }


def _answer(answer_fd: int, answer: dict[str, Any]) -> bool:
    """Tell whoever started us; False where nobody is left to hear it."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    try:
        frames.write_all(answer_fd, record.serialise(answer))
    except BrokenPipeError:
        return False
    finally:
        os.close(answer_fd)
    return True


def _complain(text: str) -> None:
    """Write to the shim's own log, which may lie on the full disk that is complained about."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        return


class Client:
    """Someone attached: what is still to be sent, and whether output waits for it."""

    __slots__ = ("attached", "first", "pending", "reader", "socket")

    def __init__(self, socket: _socket.socket, *, first: bool) -> None:
        self.socket = socket
        self.first = first
        self.attached = first
        self.pending = bytearray()
        self.reader = frames.Reader()


class Shim:
    """A container's streams and end."""

    def __init__(self, directory: str, socket_path: str, *, interactive: bool) -> None:
        self.directory = directory
        self.interactive = interactive
        self.known = state.read(directory)
        self.known |= {"shim": state.identity(os.getpid()), "socket": socket_path}
        self.clients: dict[int, Client] = {}
        self.outputs: dict[int, str] = {}
        self.stdin_fd: int | None = None
        self.stdin_pending = bytearray()
        self.stdin_ended = False
        self.replay = bytearray()
        self.terminal = False
        self.listener: _socket.socket | None = None
        self.listeners: list[Listener] = []
        self.log: Log | None = None
        self.pid = -1
        self.pidfd = -1

    # --- life

    def start(self) -> None:
        """Start the container. Raises: MlenvError; `give_up` removes what is there then."""
        bundle = bundles.read(self.directory)
        self.terminal = bool(bundle.process.get("terminal"))
        if bundle.ports:
            self._bind(bundle.ports)
        state.reserve(self.directory)
        self.log = Log(self.directory)
        self._listen()
        theirs = self._streams()
        try:
            started = surroundings.start(bundle, self.known, self.directory, stdio=theirs, note=self._note)
        finally:
            for descriptor in set(theirs):
                os.close(descriptor)
        self.pid = started.pid
        if started.terminal_fd is not None:
            self._own_terminal(started.terminal_fd)
        if self.listeners:
            self._publish()
        from mlenv.container import syscalls

        self.pidfd = syscalls.pidfd_open(self.pid)
        self.known |= {"status": "running", "started": time.time(), "exit_code": None, "finished": None}
        self._note(self.known)

    def _bind(self, ports: Sequence[dict[str, Any]]) -> None:
        from mlenv.container import forward

        self.listeners = forward.bind([_Published(port) for port in ports])
        self.known["ports"] = [{**listener.as_dict(), "protocol": "tcp"} for listener in self.listeners]

    def _publish(self) -> None:
        """Start the forwarder; a container that has ended by now needs none."""
        try:
            surroundings.publish(self.listeners, self.known, self.directory)
        except OSError:
            if state.is_alive(self.known.get("init")):
                raise
            return
        self.listeners = []

    def _note(self, known: dict[str, Any]) -> None:
        state.write(self.directory, known)

    def _listen(self) -> None:
        path = self.known["socket"]
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        if os.path.exists(path):
            os.unlink(path)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(16)
        listener.setblocking(False)
        self.listener = listener

    def _streams(self) -> tuple[int, int, int]:
        """Return the container's side of its standard streams."""
        if self.terminal:
            null_fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            return null_fd, null_fd, null_fd
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        self.outputs = {out_read: "stdout", err_read: "stderr"}
        if self.interactive:
            in_read, self.stdin_fd = os.pipe()
            os.set_blocking(self.stdin_fd, False)
        else:
            in_read = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        for descriptor in self.outputs:
            os.set_blocking(descriptor, False)
        return in_read, out_write, err_write

    def _own_terminal(self, terminal_fd: int) -> None:
        os.set_blocking(terminal_fd, False)
        self.outputs = {terminal_fd: "stdout"}
        self.stdin_fd = terminal_fd

    def give_up(self) -> None:
        """Remove everything of a start that failed."""
        self.known |= {"status": "created", "shim": None}
        self._close_around()
        for client in list(self.clients.values()):
            self._drop(client)

    def abort(self) -> None:
        """End a container that nobody waits for any more."""
        state.kill_exactly(self.known.get("init"), _signal.SIGKILL)

    # --- the loop

    def add_client(self, socket: _socket.socket, *, first: bool = False) -> None:
        """Take a client; everything to it is sent without waiting."""
        socket.setblocking(False)
        self.clients[socket.fileno()] = Client(socket, first=first)

    def serve(self) -> None:
        """Carry streams until PID 1 has ended, then say goodbye and remove everything."""
        gc.enable()
        for client in self.clients.values():
            self._send(client, frames.HELLO, b"t" if self.terminal else b"p")
        for number in _PASSED_ON:
            _signal.signal(number, self._pass_on)
        poll = select.epoll()
        registered: dict[int, int] = {}
        ended = False
        while not ended:
            self._register(poll, registered)
            for descriptor, events in poll.poll():
                if descriptor == self.pidfd:
                    ended = True
                else:
                    self._handle(descriptor, events)
        poll.close()
        self._drain()
        _, status = os.waitpid(self.pid, 0)
        self._finish(process.exit_status(status))

    def _pass_on(self, number: int, _frame: object) -> None:
        state.kill_exactly(self.known.get("init"), number)

    def _register(self, poll: select.epoll, registered: dict[int, int]) -> None:
        """Tell epoll what to wait for now; what changed since the last round only."""
        wanted = self._wanted()
        for descriptor in [known for known in registered if known not in wanted]:
            del registered[descriptor]
            try:
                poll.unregister(descriptor)
            except (OSError, ValueError):  # closing it has taken it out
                continue
        for descriptor, events in wanted.items():
            if descriptor not in registered:
                poll.register(descriptor, events)
            elif registered[descriptor] != events:
                poll.modify(descriptor, events)
            registered[descriptor] = events

    def _wanted(self) -> dict[int, int]:
        assert self.listener is not None  # noqa: S101 - for mypy; `start` has made it
        wanted = {self.pidfd: select.EPOLLIN, self.listener.fileno(): select.EPOLLIN}
        if not any(
            client.first and len(client.pending) > _CLIENT_BUFFER_MAX for client in self.clients.values()
        ):
            for descriptor in self.outputs:
                wanted[descriptor] = select.EPOLLIN
        takes_input = len(self.stdin_pending) <= _STDIN_BUFFER_MAX
        for descriptor, client in self.clients.items():
            events = select.EPOLLIN if takes_input else 0
            wanted[descriptor] = events | (select.EPOLLOUT if client.pending else 0)
        if self.stdin_fd is not None and self.stdin_pending:
            wanted[self.stdin_fd] = wanted.get(self.stdin_fd, 0) | select.EPOLLOUT
        return wanted

    def _handle(self, descriptor: int, events: int) -> None:
        if self.listener is not None and descriptor == self.listener.fileno():
            self._accept()
            return
        if descriptor in self.outputs and events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self._read_output(descriptor)
        if descriptor == self.stdin_fd and events & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
            self._write_stdin()
        client = self.clients.get(descriptor)
        if client is not None:
            if events & select.EPOLLOUT:
                self._flush(client)
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and descriptor in self.clients:
                self._read_client(client)

    def _accept(self) -> None:
        assert self.listener is not None  # noqa: S101 - for mypy
        try:
            descriptor, _ = self.listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - _socket's
        except OSError:  # the client has gone again
            return
        socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
        os.set_inheritable(descriptor, False)
        credentials = socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _SO_PEERCRED_SIZE)
        uid = int.from_bytes(credentials[4:8], sys.byteorder)
        if uid not in (0, os.geteuid()):
            socket.close()
            return
        self.add_client(socket)
        self._send(self.clients[descriptor], frames.HELLO, b"t" if self.terminal else b"p")

    def _read_output(self, descriptor: int) -> bool:
        """Read once from the container; False where there is nothing."""
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: the terminal's last user has closed it
            data = b""
        if not data:
            self._close_output(descriptor)
            return False
        stream = self.outputs[descriptor]
        if self.log is not None:
            self.log.write(stream, data)
        if self.terminal:
            self.replay += data
            del self.replay[:-_REPLAY_MAX]
        kind = frames.STDOUT if stream == "stdout" else frames.STDERR
        for client in list(self.clients.values()):
            if client.attached and (client.first or len(client.pending) <= _CLIENT_BUFFER_MAX):
                self._send(client, kind, data)
        return True

    def _close_output(self, descriptor: int) -> None:
        del self.outputs[descriptor]
        if descriptor != self.stdin_fd:
            os.close(descriptor)

    def _send(self, client: Client, kind: bytes, payload: bytes) -> None:
        client.pending += frames.frame(kind, payload)
        self._flush(client)

    def _flush(self, client: Client) -> None:
        try:
            while client.pending:
                sent = client.socket.send(client.pending[:_CLIENT_BUFFER_MAX], _socket.MSG_NOSIGNAL)
                del client.pending[:sent]
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)

    def _drop(self, client: Client) -> None:
        self.clients.pop(client.socket.fileno(), None)
        client.pending.clear()
        client.socket.close()

    def _read_client(self, client: Client) -> None:
        try:
            data = client.socket.recv(_CHUNK)
            messages = client.reader.feed(data)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self._drop(client)
            return
        if not data:
            self._drop(client)
            return
        for kind, payload in messages:
            self._obey(client, kind, payload)

    def _obey(self, client: Client, kind: bytes, payload: bytes) -> None:
        if kind == frames.ATTACH:
            if not client.attached:
                client.attached = True
                if self.replay:
                    self._send(client, frames.STDOUT, bytes(self.replay))
        elif kind == frames.STDIN:
            if payload:
                self.stdin_pending += payload
            elif not self.terminal:
                self.stdin_ended = True
            self._write_stdin()
        elif kind == frames.WINDOW:
            self._resize(*frames.window_size(payload))
        elif kind == frames.SIGNAL and payload:
            state.kill_exactly(self.known.get("init"), payload[0])

    def _write_stdin(self) -> None:
        if self.stdin_fd is None:
            self.stdin_pending.clear()
            return
        try:
            while self.stdin_pending:
                written = os.write(self.stdin_fd, self.stdin_pending[:_CHUNK])
                del self.stdin_pending[:written]
        except BlockingIOError:
            return
        except OSError:  # nobody reads it any more
            self.stdin_pending.clear()
            self.stdin_ended = not self.terminal
        if self.stdin_ended and not self.terminal:
            os.close(self.stdin_fd)
            self.stdin_fd = None

    def _resize(self, rows: int, columns: int) -> None:
        if self.terminal and self.stdin_fd is not None:
            import fcntl
            import termios

            size = rows.to_bytes(2, sys.byteorder) + columns.to_bytes(2, sys.byteorder) + bytes(4)
            fcntl.ioctl(self.stdin_fd, termios.TIOCSWINSZ, size)

    # --- the end

    def _drain(self) -> None:
        """Read what the container wrote before it ended."""
        for descriptor in list(self.outputs):
            while self._read_output(descriptor):
                continue

    def _finish(self, status: int) -> None:
        """Remove everything first and tell the clients last: who hears the end finds nothing left."""
        self.known |= {"status": "stopped", "exit_code": status, "finished": time.time()}
        self._close_around()
        if self.known.get("remove_on_exit"):
            from mlenv.container import removal

            removal.remove(self.directory)
        self._goodbye(status)

    def _goodbye(self, status: int) -> None:
        deadline = time.monotonic() + _GOODBYE_DEADLINE
        for client in list(self.clients.values()):
            self._send(client, frames.EXIT, bytes((status,)))
        while True:
            waiting = [client for client in self.clients.values() if client.pending]
            left = deadline - time.monotonic()
            if not waiting or left <= 0:
                return
            poll = select.poll()
            for client in waiting:
                poll.register(client.socket.fileno(), select.POLLOUT)
            poll.poll(left * 1000)
            for client in waiting:
                self._flush(client)

    def _close_around(self) -> None:
        """Remove what stands around the container and write the note that stays."""
        if self.listeners:
            from mlenv.container import forward

            forward.close(self.listeners)
        held = surroundings.undo(self.known)
        if held:
            self.known["warnings"] = [*self.known.get("warnings", ()), *held]
        if self.log is not None:
            self.known["log_bytes_lost"] = self.log.lost
            self.log.close()
        if self.listener is not None:
            self.listener.close()
            if os.path.exists(self.known["socket"]):
                os.unlink(self.known["socket"])
        self.known |= {"socket": None, "init": None, "shim": None}
        try:
            self._note(self.known)
        except OSError as error:  # the old note names us: its reader finds us dead
            _complain(f"the state could not be written: {error}")


class _Published:
    """A port as the forwarder takes it."""

    __slots__ = ("container_port", "host_ip", "host_port", "protocol")

    def __init__(self, port: dict[str, Any]) -> None:
        self.host_ip = port["host_ip"]
        self.host_port = port["host_port"]
        self.container_port = port["container_port"]
        self.protocol = port.get("protocol", "tcp")
