"""Published ports: listen on the host, connect to the container's loopback, carry bytes between the two.

`bind` opens the listening sockets before anything of a container exists, so a taken port costs nothing.
`start` hands them to a process of its own, which joins the container's namespaces (a user namespace takes a
single-threaded process to join) and connects to 127.0.0.1 there: servers bound to the container's loopback
are reached, no firewall rule is needed, and none can be lost. Idle, it is one thread in poll(2); a
connection costs two threads and two pipes.

A client shows itself as 127.0.0.1 inside. TCP only.

Source: tcp(7), splice(2), setns(2).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import _socket
import _thread
import os
import resource
import select
import struct
from errno import EACCES, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EMFILE, ENFILE

from mlenv.container import companion
from mlenv.errors import ContainerError, PortInUseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Protocol

    class PublishedPort(Protocol):
        """A port of `config.Port`'s shape."""

        @property
        def host_ip(self) -> str:
            """Address on the host, empty for the default."""

        @property
        def host_port(self) -> int:
            """Port on the host, 0 for any free one."""

        @property
        def container_port(self) -> int:
            """Port in the container."""

        @property
        def protocol(self) -> str:
            """The transport: "tcp"."""


LOOPBACK = ("127.0.0.1", "::1")
"""Where a port listens unless an address is given; `localhost` in a browser may mean either."""

MAX_CONNECTIONS = 512
"""Connections carried at a time; more wait in the listening sockets' backlog."""

_BACKLOG = 1024
_FDS_PER_CONNECTION = 6
_FDS_RESERVED = 64
_CHUNK = 1 << 20
_STACK_SIZE = 256 * 1024
_SPLICE_F_MOVE = 1
_FREE_PORT_TRIES = 16
_NEXT_PORTS = 100
_LISTEN = "0A"


class Listener:
    """A listening socket of the host and the container's port it leads to."""

    __slots__ = ("container_port", "fd", "host_ip", "host_port")

    def __init__(self, *, fd: int, host_ip: str, host_port: int, container_port: int) -> None:
        self.fd = fd
        self.host_ip = host_ip
        self.host_port = host_port
        self.container_port = container_port

    def as_dict(self) -> dict[str, Any]:
        """Return the listener as plain JSON, in the words of a bundle's `dev.mlenv.ports`."""
        return {
            "host_ip": self.host_ip,
            "host_port": self.host_port,
            "container_port": self.container_port,
            "protocol": "tcp",
        }


# --- binding


def bind(ports: Iterable[PublishedPort]) -> list[Listener]:
    """Open the listening sockets of all `ports`, or none.

    An empty address, `localhost` or 127.0.0.1 means 127.0.0.1 and, where the host has it, ::1; any other is
    bound as it is. Port 0 is replaced by a free one. The descriptors are close-on-exec.

    Raises: PortInUseError naming who has the port; ContainerError for UDP, addresses that are not the
    host's and ports that take privilege.
    """
    listeners: list[Listener] = []
    try:
        for port in ports:
            listeners += _bind_port(port)
    except BaseException:
        close(listeners)
        raise
    return listeners


def close(listeners: Iterable[Listener]) -> None:
    """Close the listening sockets in this process."""
    for listener in listeners:
        os.close(listener.fd)


def _bind_port(port: PublishedPort) -> list[Listener]:
    """Listen on every address of one port; a free port must be free on all of them."""
    if port.protocol != "tcp":
        raise ContainerError(
            f"port {port.host_port} cannot be published over {port.protocol}",
            cause="published ports carry TCP alone",
            hint="use `network: host` for a server that speaks UDP",
            code="port-protocol",
        )
    addresses = LOOPBACK if port.host_ip in ("", "localhost", *LOOPBACK[:1]) else (port.host_ip.strip("[]"),)
    for attempt in range(_FREE_PORT_TRIES):
        opened: list[Listener] = []
        number = port.host_port
        try:
            for address in addresses:
                fd, number = listen(address, number, optional=address == LOOPBACK[1] and len(addresses) > 1)
                if fd >= 0:
                    opened.append(
                        Listener(fd=fd, host_ip=address, host_port=number, container_port=port.container_port)
                    )
        except OSError as error:
            close(opened)
            if error.errno == EADDRINUSE and port.host_port == 0 and attempt < _FREE_PORT_TRIES - 1:
                continue
            raise _bind_error(port, addresses[len(opened)], addresses, error) from error
        return opened
    raise AssertionError("unreachable: the last attempt returns or raises")


def listen(address: str, port: int, *, optional: bool = False) -> tuple[int, int]:
    """Return (descriptor, port) of a socket that listens; -1 where an `optional` address is not there."""
    try:
        sock = _socket.socket(_family(address), _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    except OSError as error:
        if optional and error.errno == EAFNOSUPPORT:
            return -1, port
        raise
    try:
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        if ":" in address:
            sock.setsockopt(_socket.IPPROTO_IPV6, _socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if optional and error.errno == EADDRNOTAVAIL:
            return -1, port
        raise
    bound: int = sock.getsockname()[1]
    return sock.detach(), bound


def _family(address: str) -> int:
    return _socket.AF_INET6 if ":" in address else _socket.AF_INET


def _bind_error(
    port: PublishedPort, address: str, addresses: Sequence[str], error: OSError
) -> ContainerError:
    where = f"[{address}]:{port.host_port}" if ":" in address else f"{address}:{port.host_port}"
    if error.errno == EADDRINUSE:
        free = _next_free(addresses, port.host_port)
        return PortInUseError(
            f"port {where} is in use",
            cause=holder(address, port.host_port),
            hint=f"use `-p {free}:{port.container_port}`, which is free" if free else "use another port",
        )
    if error.errno == EACCES:
        return ContainerError(
            f"port {where} cannot be listened on",
            cause="ports below 1024 are root's",
            hint=f"use `-p {port.host_port + 8000}:{port.container_port}`",
            code="port-privileged",
        )
    return ContainerError(
        f"port {where} cannot be listened on",
        cause=error.strerror or str(error),
        hint="give an address of this host, or none for 127.0.0.1",
        code="port-address",
    )


def _next_free(addresses: Sequence[str], port: int) -> int | None:
    """Return the first port after `port` that is free on all `addresses`."""
    for number in range(port + 1, min(port + _NEXT_PORTS, 65536)):
        fds = []
        try:
            for address in addresses:
                fds.append(listen(address, number, optional=True)[0])  # noqa: PERF401 - what is open is closed below
        except OSError:
            continue
        else:
            return number
        finally:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
    return None


# --- who has a port


def holder(address: str, port: int) -> str:
    """Return who listens on `port`, in words, as far as this user may see it. Source: proc_pid_net(5)."""
    for inode, uid in _listening_inodes(address, port):
        process = _process_with_socket(inode)
        if process:
            return f"pid {process[0]} (`{process[1]}`) listens on it"
        return f"a process of uid {uid} listens on it; root can see which"
    return "nobody listens on it in this network namespace, but a connection still holds it"


def _listening_inodes(address: str, port: int) -> Iterator[tuple[str, int]]:
    """Yield (inode, uid) of the sockets that listen on `port` and stand in the way of `address`."""
    wanted = _proc_address(address)
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{table}", encoding="utf-8") as file:
                rows = [line.split() for line in file.readlines()[1:]]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for row in rows:
            local, _, number = row[1].rpartition(":")
            in_the_way = local == wanted or int(local, 16) == 0 or int(wanted, 16) == 0
            if row[3] == _LISTEN and int(number, 16) == port and in_the_way:
                yield row[9], int(row[7])


def _proc_address(address: str) -> str:
    """Return an address as proc_pid_net(5) writes it: words of 32 bits in the host's byte order."""
    packed = _socket.inet_pton(_family(address), address)
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


def _process_with_socket(inode: str) -> tuple[int, str] | None:
    """Return (pid, command line) of a process that has the socket open."""
    wanted = f"socket:[{inode}]"
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fds = os.listdir(f"/proc/{entry}/fd")
            if any(os.readlink(f"/proc/{entry}/fd/{fd}") == wanted for fd in fds):
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    return int(entry), file.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # ended meanwhile, or another user's
    return None


# --- the forwarder's process


def start(
    listeners: Sequence[Listener], container_pid: int, *, rootless: bool, log: str, address: str | None = None
) -> companion.Identity:
    """Carry connections from `listeners` into the network namespace of `container_pid` until it is ended.

    The container's 127.0.0.1 is tried first, then its ::1 and `address`. The caller, single-threaded, may
    close the listeners afterwards. End it with `companion.end`; it dies with its parent.

    Raises: OSError where the namespaces cannot be joined.
    """
    parent = os.getpid()
    targets = [*LOOPBACK, address] if address else [*LOOPBACK]

    def work(ready: Callable[[], None]) -> None:
        companion.join_namespaces(container_pid, parent, rootless=rootless)
        _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
        carrier = Carrier(targets)
        ready()
        carrier.serve(listeners)

    return companion.start(work, keep=[listener.fd for listener in listeners], log=log)


class Carrier:
    """Accepts connections and carries each to the first of `targets` that answers on its port."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets
        self._slots = _slots()
        self._lock = _thread.allocate_lock()
        self._freed_fd, self._free_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _thread.stack_size(_STACK_SIZE)

    def serve(self, listeners: Sequence[Listener]) -> None:
        """Accept until killed; while every slot is taken, nothing is accepted and clients wait."""
        sockets = {listener.fd: (_socket.socket(fileno=listener.fd), listener) for listener in listeners}
        accepting, full = select.poll(), select.poll()
        for poller in (accepting, full):
            poller.register(self._freed_fd, select.POLLIN)
        for fd, (sock, _) in sockets.items():
            sock.setblocking(False)
            accepting.register(fd, select.POLLIN)
        while True:
            for fd, _ in (accepting if self._slots > 0 else full).poll():
                if fd == self._freed_fd:
                    os.read(fd, 4096)
                elif self._slots > 0:
                    self._accept(*sockets[fd])

    def _accept(self, sock: _socket.socket, listener: Listener) -> None:
        try:
            fd, _ = sock._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - `socket` imports selectors, enum
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client left
        except OSError as error:
            if error.errno not in (EMFILE, ENFILE):
                raise
            select.poll().poll(100)  # the host is out of descriptors: do not spin
            return
        self._add_slots(-1)
        client = _socket.socket(fileno=fd)
        client.setblocking(True)
        try:
            _thread.start_new_thread(self._carry, (client, listener.container_port))
        except RuntimeError:  # the container's or user's limit of threads
            _reset(client)
            self._add_slots(1)

    def _add_slots(self, count: int) -> None:
        with self._lock:
            self._slots += count

    def _carry(self, client: _socket.socket, port: int) -> None:
        """Carry one connection to its end, in a thread of its own."""
        try:
            server = self._connect(port)
            if server is None:
                _reset(client)
            else:
                _carry_both(client, server)
        finally:
            client.close()
            self._add_slots(1)
            try:  # noqa: SIM105 - contextlib costs 5 ms
                os.write(self._free_fd, b"\0")
            except BlockingIOError:
                pass  # the pipe is full of such bytes: the accepting thread wakes anyway

    def _connect(self, port: int) -> _socket.socket | None:
        """Return a connection to the container's server, or None where nothing listens there."""
        for target in self._targets:
            try:
                server = _socket.socket(_family(target), _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            except OSError:
                continue  # the container has no IPv6
            try:
                server.connect((target, port))
            except OSError:
                server.close()
            else:
                return server
        return None


def _slots() -> int:
    """Return how many connections the limit of descriptors allows, after raising it as far as we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FDS_RESERVED + _FDS_PER_CONNECTION * MAX_CONNECTIONS
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(MAX_CONNECTIONS, (soft - _FDS_RESERVED) // _FDS_PER_CONNECTION))


def _reset(sock: _socket.socket) -> None:
    """Close a connection so that the other side sees a reset, not an end."""
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, struct.pack("=ii", 1, 0))
    sock.close()


def _carry_both(client: _socket.socket, server: _socket.socket) -> None:
    """Carry both directions until both have ended; a broken side resets the other."""
    for sock in (client, server):
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
    upward = _Direction(client, server)
    downward = _Direction(server, client)
    done = _thread.allocate_lock()
    done.acquire()
    try:
        _thread.start_new_thread(upward.run, (done.release,))
    except RuntimeError:
        _reset(client)
        _reset(server)
        return
    downward.run(lambda: None)
    done.acquire()
    close_one = _reset if upward.broken or downward.broken else _socket.socket.close
    close_one(server)
    close_one(client)


class _Direction:
    """Bytes from one socket to another, through a pipe and without a copy."""

    __slots__ = ("broken", "source", "target")

    def __init__(self, source: _socket.socket, target: _socket.socket) -> None:
        self.source = source
        self.target = target
        self.broken = False

    def run(self, finished: Callable[[], object]) -> None:
        """Carry until the source ends, then end the target's input; what breaks wakes the other direction."""
        try:
            self._pump()
            self.target.shutdown(_socket.SHUT_WR)
        except OSError:
            self.broken = True
            for sock in (self.source, self.target):
                try:  # noqa: SIM105 - contextlib costs 5 ms
                    sock.shutdown(_socket.SHUT_RD)
                except OSError:
                    pass  # not connected any more: its reader is awake
        finally:
            finished()

    def _pump(self) -> None:
        source_fd, target_fd = self.source.fileno(), self.target.fileno()
        out_fd, in_fd = os.pipe()
        try:
            while count := os.splice(source_fd, in_fd, _CHUNK, flags=_SPLICE_F_MOVE):
                while count:
                    count -= os.splice(out_fd, target_fd, count, flags=_SPLICE_F_MOVE)
        finally:
            os.close(out_fd)
            os.close(in_fd)
