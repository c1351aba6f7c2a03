"""The listening sockets of published ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlenv.container import forward
from mlenv.container.config import Port
from mlenv.errors import ContainerError, PortInUseError


def port(number: int = 0, *, host_ip: str = "127.0.0.1", protocol: str = "tcp") -> Port:
    return Port(host_ip=host_ip, host_port=number, container_port=80, protocol=protocol)


@pytest.fixture
def taken() -> int:
    """A port that this process listens on at 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_by_default_both_loopback_addresses() -> None:
    listeners = forward.bind([port()])
    try:
        assert [listener.host_ip for listener in listeners] == ["127.0.0.1", "::1"][: len(listeners)]
        assert len({listener.host_port for listener in listeners}) == 1
        for listener in listeners:
            socket.create_connection((listener.host_ip, listener.host_port), timeout=5).close()
    finally:
        forward.close(listeners)


@pytest.mark.parametrize("address", ["127.0.0.2", "0.0.0.0", "::1", "[::1]"])  # noqa: S104
def test_an_address_is_bound_exactly(address: str) -> None:
    listeners = forward.bind([port(host_ip=address)])
    forward.close(listeners)
    assert [listener.host_ip for listener in listeners] == [address.strip("[]")]


def test_descriptors_are_not_inherited() -> None:
    listeners = forward.bind([port()])
    assert not any(os.get_inheritable(listener.fd) for listener in listeners)
    forward.close(listeners)


def test_as_dict_is_what_a_bundle_says() -> None:
    (listener, *others) = forward.bind([port()])
    forward.close([listener, *others])
    assert listener.as_dict() == {
        "host_ip": "127.0.0.1",
        "host_port": listener.host_port,
        "container_port": 80,
        "protocol": "tcp",
    }


def test_a_taken_port_names_who_has_it(taken: int) -> None:
    with pytest.raises(PortInUseError) as failure:
        forward.bind([port(taken)])
    assert failure.value.message == f"port 127.0.0.1:{taken} is in use"
    assert failure.value.cause.startswith(f"pid {os.getpid()} (`")
    assert "pytest" in failure.value.cause


def test_another_process_is_named_with_its_command() -> None:
    serve = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); input()"
    line = [sys.executable, "-c", serve, "a-server"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        number = int(server.stdout.readline())
        with pytest.raises(PortInUseError) as failure:
            forward.bind([port(number)])
        server.stdin.close()
    assert f"pid {server.pid} (`{sys.executable} -c" in failure.value.cause
    assert "a-server`) listens on it" in failure.value.cause


def test_the_hint_is_a_port_that_is_free(taken: int) -> None:
    with pytest.raises(PortInUseError) as failure:
        forward.bind([port(taken)])
    free = int(failure.value.hint.split("`-p ")[1].split(":")[0])
    assert free > taken
    forward.close(forward.bind([port(free)]))


def test_a_listener_on_another_address_is_not_to_blame(taken: int) -> None:
    """Of two listeners with one number, the one in the way is named."""
    assert forward.holder("127.0.0.3", taken).startswith("nobody listens on it")
    assert forward.holder("0.0.0.0", taken).startswith(f"pid {os.getpid()} ")  # noqa: S104


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_all_or_none(taken: int) -> None:
    before = descriptors()
    with pytest.raises(PortInUseError):
        forward.bind([port(), port(), port(taken)])
    assert descriptors() == before


def test_the_same_port_twice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        number = probe.getsockname()[1]
    with pytest.raises(PortInUseError):
        forward.bind([port(number), port(number)])


def test_udp_is_refused() -> None:
    with pytest.raises(ContainerError) as failure:
        forward.bind([port(5353, protocol="udp")])
    assert failure.value.code == "port-protocol"
    assert str(failure.value.message) == "port 5353 cannot be published over udp"


def test_an_address_that_is_not_the_hosts() -> None:
    with pytest.raises(ContainerError) as failure:
        forward.bind([port(host_ip="203.0.113.7")])
    assert failure.value.code == "port-address"
    assert failure.value.cause == "Cannot assign requested address"


def test_a_name_is_no_address() -> None:
    with pytest.raises(ContainerError) as failure:
        forward.bind([port(host_ip="not an address")])
    assert failure.value.code == "port-address"
