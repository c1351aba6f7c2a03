"""A relay for names, where the host resolves on its loopback and a container on the bridge cannot reach it.

It answers at DNS_FORWARDER on the container's loopback, the address that pasta and slirp4netns answer at,
and asks the host's servers in turn, so that a client's second try reaches another one. UDP questions have a
socket and a port of their own each; TCP is carried as published ports are.

Source: RFC 1035 section 4.2; RFC 5452 section 9 (source ports).
"""

from __future__ import annotations

import _socket
import _thread
import os
import select
import time

from mlenv.container import companion, forward, netlink, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PORT = 53
_MAX_QUESTIONS = 256
_ANSWER_TIMEOUT = 5.0
_MAX_DATAGRAM = 65535
_LOOPBACK_INDEX = 1


def start(address: str, servers: Sequence[str], netns_pid: int, *, log: str) -> companion.Identity:
    """Answer names at `address` in the network namespace of `netns_pid` from `servers` of ours, until ended.

    Raises: OSError where the namespace cannot be joined or the address is taken in it.
    """
    parent = os.getpid()

    def work(ready: Callable[[], None]) -> None:
        datagrams, listener = _listen_inside(address, netns_pid)
        companion.die_with(parent)
        streams = forward.Carrier(servers)
        ready()
        _thread.start_new_thread(streams.serve, ([listener],))
        _Datagrams(datagrams, servers).serve()

    return companion.start(work, log=log)


def _listen_inside(address: str, netns_pid: int) -> tuple[_socket.socket, forward.Listener]:
    """Open the sockets in the container's network namespace and return to ours, where answers come from."""
    host_fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    companion.join_namespaces(netns_pid, os.getppid(), rootless=False)
    with netlink.Netlink(netlink.NETLINK_ROUTE) as inside:
        netlink.add_address(inside, _LOOPBACK_INDEX, _socket.inet_pton(_socket.AF_INET, address), 32)
    datagrams = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    datagrams.bind((address, PORT))
    fd, _ = forward.listen(address, PORT)
    syscalls.setns(host_fd, syscalls.CLONE_NEWNET)
    os.close(host_fd)
    return datagrams, forward.Listener(fd=fd, host_ip=address, host_port=PORT, container_port=PORT)


class _Question:
    """A question that was passed on: who asked, the socket that waits for the answer, and until when."""

    __slots__ = ("asker", "socket", "until")

    def __init__(self, asker: tuple[str, int], server: str) -> None:
        self.asker = asker
        self.until = time.monotonic() + _ANSWER_TIMEOUT
        kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self.socket = _socket.socket(_socket.AF_INET6 if ":" in server else _socket.AF_INET, kind)
        self.socket.connect((server, PORT))


class _Datagrams:
    """Passes questions on and answers back; what gets no answer in time is forgotten, as on any network."""

    def __init__(self, inside: _socket.socket, servers: Sequence[str]) -> None:
        self._inside = inside
        self._servers = list(servers)
        self._questions: dict[int, _Question] = {}

    def serve(self) -> None:
        """Relay until killed."""
        while True:
            poller = select.poll()
            poller.register(self._inside.fileno(), select.POLLIN)
            for fd in self._questions:
                poller.register(fd, select.POLLIN)
            for fd, _ in poller.poll(_ANSWER_TIMEOUT * 1000 if self._questions else None):
                if fd == self._inside.fileno():
                    self._pass_on()
                else:
                    self._answer(self._questions.pop(fd))
            self._forget()

    def _pass_on(self) -> None:
        data, asker = self._inside.recvfrom(_MAX_DATAGRAM)
        server = self._servers[0]
        self._servers.append(self._servers.pop(0))
        try:
            question = _Question(asker, server)
            question.socket.send(data)
        except OSError as error:  # the asker tries again, and reaches the next server
            os.write(2, f"{server}: {error}\n".encode())
            return
        self._questions[question.socket.fileno()] = question

    def _answer(self, question: _Question) -> None:
        try:
            self._inside.sendto(question.socket.recv(_MAX_DATAGRAM), question.asker)
        except OSError as error:  # nobody listens at the server, or the asker has gone
            os.write(2, f"answer to {question.asker}: {error}\n".encode())
        question.socket.close()

    def _forget(self) -> None:
        now = time.monotonic()
        surplus = len(self._questions) - _MAX_QUESTIONS
        for number, (fd, question) in enumerate(list(self._questions.items())):
            if question.until <= now or number < surplus:
                del self._questions[fd]
                question.socket.close()
