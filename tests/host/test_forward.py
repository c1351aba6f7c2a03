"""Published ports, over real sockets into a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import networks
import pytest
from requires import requires

from mlenv.container import companion, forward
from mlenv.container.config import Port
from mlenv.container.state import is_alive

pytestmark = requires("root", "netns")

ECHO = """
import socket, sys, threading
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], 80), family=family, backlog=1024)
print("listening", flush=True)
def echo(client):
    while data := client.recv(1 << 20):
        client.sendall(data)
    client.shutdown(socket.SHUT_WR)
    client.close()
while True:
    threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
"""

RESET = """
import socket, struct
server = socket.create_server(("127.0.0.1", 80))
print("listening", flush=True)
client, _ = server.accept()
client.recv(1)
client.sendall(b"x" * 1000)
client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
client.close()
"""

COUNT_FIRST = """
import socket
server = socket.create_server(("127.0.0.1", 80))
print("listening", flush=True)
client, _ = server.accept()
size = 0
while data := client.recv(1 << 16):
    size += len(data)
client.sendall(str(size).encode())
"""

SAY_END = """
import socket
server = socket.create_server(("127.0.0.1", 80))
print("listening", flush=True)
client, _ = server.accept()
try:
    while client.recv(1 << 16):
        pass
    print("end", flush=True)
except ConnectionResetError:
    print("reset", flush=True)
"""


@pytest.fixture
def container() -> Iterator[int]:
    with networks.container() as pid:
        networks.inside(pid, "ip", "link", "set", "lo", "up")
        yield pid


@pytest.fixture
def publish(container: int, tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Publish the container's port 80; returns the host's port."""
    with contextlib.ExitStack() as undo:

        def call() -> int:
            listeners = forward.bind(
                [Port(host_ip="127.0.0.1", host_port=0, container_port=80, protocol="tcp")]
            )
            running = forward.start(listeners, container, rootless=False, log=str(tmp_path / "forward.log"))
            undo.callback(companion.end, running)
            forward.close(listeners)
            call.process = running
            return listeners[0].host_port

        yield call
    log = tmp_path / "forward.log"
    assert not log.exists() or log.read_text() == ""


def serve(container: int, script: str, *args: str) -> contextlib.AbstractContextManager:
    return networks.process("nsenter", "-t", str(container), "-n", sys.executable, "-c", script, *args)


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=networks.DEADLINE)


def turned_away(port: int) -> None:
    """See a connection reset, which may be before it seems made."""

    def ask() -> None:
        with connect(port) as client:
            client.recv(1)

    with pytest.raises(ConnectionResetError):
        ask()


def test_a_server_on_the_containers_loopback_is_reached(container: int, publish: Callable[[], int]) -> None:
    port = publish()
    with serve(container, ECHO, "127.0.0.1"):
        for host in ("127.0.0.1", "::1"):
            with connect(port, host) as client:
                client.sendall(b"hello")
                assert client.recv(5) == b"hello"


def test_a_server_on_the_containers_ipv6_loopback_alone_is_reached(
    container: int, publish: Callable[[], int]
) -> None:
    port = publish()
    with serve(container, ECHO, "::1"), connect(port) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"


def test_bytes_come_back_as_they_went(container: int, publish: Callable[[], int]) -> None:
    port = publish()
    block = os.urandom(1 << 20)
    rounds = 64
    sent, received = hashlib.sha256(), hashlib.sha256()
    with serve(container, ECHO, "127.0.0.1"), connect(port) as client:

        def send() -> None:
            for _ in range(rounds):
                client.sendall(block)
                sent.update(block)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while data := client.recv(1 << 20):
            received.update(data)
        sender.join()
    assert received.digest() == sent.digest()


def test_an_end_of_one_direction_leaves_the_other_open(container: int, publish: Callable[[], int]) -> None:
    """The server answers only after it has seen the client's end."""
    port = publish()
    with serve(container, COUNT_FIRST), connect(port) as client:
        client.sendall(b"x" * 300_000)
        client.shutdown(socket.SHUT_WR)
        assert client.makefile().read() == "300000"


def test_a_servers_reset_reaches_the_client_as_a_reset(container: int, publish: Callable[[], int]) -> None:
    port = publish()
    with serve(container, RESET), connect(port) as client:
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            client.makefile().read()


def test_a_clients_reset_reaches_the_server_as_a_reset(container: int, publish: Callable[[], int]) -> None:
    port = publish()
    with serve(container, SAY_END) as server:
        client = connect(port)
        client.sendall(b"x")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert server.stdout.readline() == "reset\n"


def test_a_clients_close_reaches_the_server_as_an_end(container: int, publish: Callable[[], int]) -> None:
    port = publish()
    with serve(container, SAY_END) as server:
        with connect(port) as client:
            client.sendall(b"x")
        assert server.stdout.readline() == "end\n"


def test_nobody_listens_inside(publish: Callable[[], int]) -> None:
    """The client is turned away at once, for a proxy cannot refuse what it has accepted."""
    turned_away(publish())


def test_a_server_that_starts_later(container: int, publish: Callable[[], int]) -> None:
    port = publish()
    turned_away(port)
    with serve(container, ECHO, "127.0.0.1"), connect(port) as client:
        client.sendall(b"now")
        assert client.recv(3) == b"now"


def test_more_clients_than_slots_wait_and_are_served(
    container: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "MAX_CONNECTIONS", 4)
    listeners = forward.bind([Port(host_ip="127.0.0.1", host_port=0, container_port=80, protocol="tcp")])
    running = forward.start(listeners, container, rootless=False, log=str(tmp_path / "log"))
    forward.close(listeners)
    try:
        with serve(container, ECHO, "127.0.0.1"), contextlib.ExitStack() as closing:
            clients = [closing.enter_context(connect(listeners[0].host_port)) for _ in range(20)]
            for number, client in enumerate(clients):
                client.sendall(bytes([number]))
            for number, client in enumerate(clients):
                assert client.recv(1) == bytes([number])
                assert threads(running["pid"]) < len(clients)  # two each, and some that are ending
                client.close()
    finally:
        companion.end(running)


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_nothing_is_left_of_connections(container: int, publish: Callable[[], int]) -> None:
    port = publish()
    pid = publish.process["pid"]
    before = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    with serve(container, ECHO, "127.0.0.1"):
        for _ in range(50):
            with connect(port) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
    for _ in range(10):
        turned_away(port)
    networks.until(lambda: threads(pid) == 1, "the threads end")
    networks.until(
        lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) == before, "the descriptors are closed"
    )


def test_the_forwarder_holds_nothing_of_its_parents(publish: Callable[[], int]) -> None:
    """Such as the lock of a container, which must not outlive the shim."""
    reading, writing = os.pipe()
    publish()
    os.close(writing)
    os.set_blocking(reading, False)
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_the_forwarder_dies_with_the_shim(container: int, tmp_path: Path) -> None:
    listeners = forward.bind([Port(host_ip="127.0.0.1", host_port=0, container_port=80, protocol="tcp")])
    reading, writing = os.pipe()
    shim = os.fork()
    if shim == 0:
        running = forward.start(listeners, container, rootless=False, log=str(tmp_path / "log"))
        os.write(writing, json.dumps(running).encode())
        signal.pause()
    forward.close(listeners)
    forwarder = json.loads(os.read(reading, 500))
    os.close(reading)
    os.close(writing)
    os.kill(shim, signal.SIGKILL)
    os.waitpid(shim, 0)
    networks.until(lambda: not is_alive(forwarder), "the forwarder ends")
    again = Port(host_ip="127.0.0.1", host_port=listeners[0].host_port, container_port=80, protocol="tcp")
    forward.close(forward.bind([again]))


def test_a_container_that_is_gone(tmp_path: Path) -> None:
    with networks.container() as pid:
        pass
    listeners = forward.bind([Port(host_ip="127.0.0.1", host_port=0, container_port=80, protocol="tcp")])
    with pytest.raises(OSError, match="No such file"):
        forward.start(listeners, pid, rootless=False, log=str(tmp_path / "log"))
    forward.close(listeners)
