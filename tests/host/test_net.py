"""The network of root's containers, in the test's own namespaces; iproute2, nft and pyroute2 look on."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networks
import pytest
from requires import requires

from mlenv.container import namespaces, net
from mlenv.container.state import is_alive
from mlenv.errors import ContainerStartError

pytestmark = requires("root", "netns", "nft")

Setup = Callable[..., dict[str, Any]]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A host of the test's own, in which nothing is left in the end."""
    monkeypatch.setattr(net, "LOCK", str(tmp_path / "run" / "network.lock"))
    monkeypatch.setattr(net, "RESOLV_CONF", str(tmp_path / "resolv.conf"))
    (tmp_path / "resolv.conf").write_text("nameserver 203.0.113.53\n")
    with networks.host():
        yield
        assert set(networks.interfaces()) == {"lo", "uplink"}
        assert networks.sh("nft list tables") == ""


@pytest.fixture
def container(host: None) -> Iterator[int]:
    with networks.container() as pid:
        yield pid


@pytest.fixture
def setup(host: None, tmp_path: Path) -> Iterator[Setup]:
    """`net.setup` with an id of its own for each container, torn down in the end."""
    states: list[dict[str, Any]] = []

    def call(mode: str, pid: int, container_id: str | None = None) -> dict[str, Any]:
        name = container_id or secrets.token_hex(32)
        states.append(net.setup(mode, name, pid, rootless=False, state_dir=str(tmp_path)))
        return states[-1]

    yield call
    for state in states:
        net.teardown(state)


def test_a_private_container_reaches_a_server_outside(setup: Setup, container: int) -> None:
    state = setup("private", container)
    assert state["warnings"] == []
    assert networks.inside(container, sys.executable, "-c", networks.ASK).strip() == "198.51.100.1"


def test_the_state_is_plain_json(setup: Setup, container: int) -> None:
    state = setup("private", container)
    assert json.loads(json.dumps(state)) == state


def test_what_the_container_sees(setup: Setup, container: int) -> None:
    state = setup("private", container)
    links = {
        link["ifname"]: link for link in json.loads(networks.inside(container, "ip", "-json", "address"))
    }
    assert {"lo", "eth0"} == set(links)
    assert "UP" in links["lo"]["flags"]
    (address,) = [found for found in links["eth0"]["addr_info"] if found["family"] == "inet"]
    assert (address["local"], address["prefixlen"]) == (state["address"], 24)
    (route,) = json.loads(networks.inside(container, "ip", "-json", "route", "show", "default"))
    assert (route["gateway"], route["dev"]) == (state["gateway"], "eth0")


def test_pyroute2_sees_what_raw_netlink_made(setup: Setup, container: int) -> None:
    import pyroute2

    state = setup("private", container)
    with pyroute2.IPRoute() as route:
        (bridge,) = route.link("get", ifname=net.BRIDGE)
        (port,) = route.link("get", ifname=state["veth"])
        (address,) = route.get_addr(index=bridge["index"], family=2)
    assert bridge.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "bridge"
    assert port.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "veth"
    assert port.get_attr("IFLA_MASTER") == bridge["index"]
    assert port.get_attr("IFLA_IFALIAS") == f"mlenv {state['address']} {state['container']}"
    assert (address.get_attr("IFA_ADDRESS"), address["prefixlen"]) == (state["gateway"], 24)


def test_nft_reads_the_rules_as_they_are_meant(setup: Setup, container: int) -> None:
    state = setup("private", container)
    network = state["gateway"].rpartition(".")[0] + ".0/24"
    words = networks.sh("nft list table ip mlenv").split()
    assert f'ip saddr {network} oifname != "mlenv0" masquerade' in " ".join(words)
    dropped = 'oifname "mlenv0" iifname != "mlenv0" ct state ! established,related drop'
    assert dropped in " ".join(words)


def test_nobody_outside_begins_a_connection(setup: Setup, container: int) -> None:
    state = setup("private", container)
    serve = "import socket; s = socket.create_server(('', 9000)); print('up', flush=True); s.accept()"
    line = ["nsenter", "-t", str(container), "-n", sys.executable, "-c", serve]
    with networks.process(*line), networks.container() as outsider:
        networks.sh(f"""
            ip link add stranger type veth peer name way netns {outsider}
            ip address add 203.0.113.1/24 dev stranger
            ip link set stranger up
            nsenter -t {outsider} -n ip address add 203.0.113.2/24 dev way
            nsenter -t {outsider} -n ip link set way up
            nsenter -t {outsider} -n ip route add default via 203.0.113.1
        """)
        ask = f"import socket\ntry: socket.create_connection(('{state['address']}', 9000), 1)\n"
        ask += "except TimeoutError: print('dropped')"
        assert networks.inside(outsider, sys.executable, "-c", ask).strip() == "dropped"
        networks.sh("ip link delete stranger")


def test_containers_reach_each_other(setup: Setup, container: int) -> None:
    setup("private", container)
    with networks.container() as other:
        address = setup("private", other)["address"]
        serve = "import socket; s = socket.create_server(('', 9000)); print('up', flush=True); s.accept()"
        with networks.process("nsenter", "-t", str(other), "-n", sys.executable, "-c", serve):
            ask = f"import socket; socket.create_connection(('{address}', 9000), 5); print('connected')"
            assert networks.inside(container, sys.executable, "-c", ask).strip() == "connected"


def test_addresses_differ_and_are_used_again(setup: Setup, container: int) -> None:
    first = setup("private", container)
    with networks.container() as second_pid:
        second = setup("private", second_pid)
        assert first["address"] != second["address"]
        net.teardown(first)
        with networks.container() as third_pid:
            assert setup("private", third_pid)["address"] == first["address"]


def test_the_last_container_removes_what_all_share(setup: Setup, container: int) -> None:
    first = setup("private", container)
    with networks.container() as other:
        second = setup("private", other)
        net.teardown(first)
        assert net.BRIDGE in networks.interfaces()
        assert "mlenv" in networks.sh("nft list tables")
        net.teardown(second)
    assert net.BRIDGE not in networks.interfaces()
    assert networks.sh("nft list tables") == ""


def test_teardown_twice(setup: Setup, container: int) -> None:
    state = setup("private", container)
    net.teardown(state)
    net.teardown(state)


def test_teardown_leaves_another_containers_interface_of_the_same_name(setup: Setup, container: int) -> None:
    state = setup("private", container, "c" * 64)
    net.teardown({**state, "container": "c" * 12 + "d" * 52})
    assert state["veth"] in networks.interfaces()


def test_a_namespace_that_ended_is_swept(setup: Setup) -> None:
    with networks.container() as pid:
        state = setup("private", pid)
    networks.until(lambda: state["veth"] not in networks.interfaces(), "the kernel removes the pair")
    assert net.BRIDGE in networks.interfaces()
    net.teardown(state)
    assert net.BRIDGE not in networks.interfaces()


def test_a_network_that_a_route_covers_is_not_taken(setup: Setup, container: int) -> None:
    networks.sh("ip route add 10.207.0.0/23 via 198.51.100.2")
    assert setup("private", container)["address"] == "10.207.2.2"


def test_a_whole_pool_that_a_vpn_covers_is_passed_over(setup: Setup, container: int) -> None:
    networks.sh("ip route add 10.0.0.0/8 via 198.51.100.2; ip route add 0.0.0.0/1 via 198.51.100.2")
    assert setup("private", container)["address"] == "172.29.0.2"


def test_no_network_is_free(setup: Setup, container: int) -> None:
    for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"):
        networks.sh(f"ip route add {network} via 198.51.100.2")
    with pytest.raises(ContainerStartError, match="no private network is free"):
        setup("private", container)


def test_rules_that_a_firewalls_reload_removed_come_back(setup: Setup, container: int) -> None:
    setup("private", container)
    networks.sh("nft flush ruleset")
    with networks.container() as other:
        setup("private", other)
    assert networks.inside(container, sys.executable, "-c", networks.ASK).strip() == "198.51.100.1"


def test_a_bridge_that_a_killed_process_left_half_made_is_mended(setup: Setup, container: int) -> None:
    networks.sh(f"ip link add {net.BRIDGE} type bridge; ip link set {net.BRIDGE} up")
    setup("private", container)
    assert networks.inside(container, sys.executable, "-c", networks.ASK).strip() == "198.51.100.1"


def test_routing_is_switched_on_and_said_once(setup: Setup, container: int) -> None:
    first = setup("private", container)
    assert first["notes"] == ["switched on net.ipv4.ip_forward, which containers need to reach the network"]
    with networks.container() as other:
        assert setup("private", other)["notes"] == []


@pytest.mark.parametrize("chain", ["DOCKER-USER", "FORWARD"])
def test_a_firewall_that_drops_lets_containers_through(setup: Setup, container: int, chain: str) -> None:
    """As dockerd sets the host up where it switched routing on, and as ufw does."""
    tool = namespaces.find_program("iptables-nft")
    if tool is None:
        pytest.skip("needs iptables: not installed")
    script = f"{tool} -P FORWARD DROP"
    if chain == "DOCKER-USER":
        script += (
            f"; {tool} -N DOCKER-USER; {tool} -A DOCKER-USER -j RETURN; {tool} -A FORWARD -j DOCKER-USER"
        )
    networks.sh(script)
    before = networks.sh(f"{tool} -S")
    state = setup("private", container)
    assert networks.inside(container, sys.executable, "-c", networks.ASK).strip() == "198.51.100.1"
    net.teardown(state)
    assert networks.sh(f"{tool} -S") == before
    networks.sh(f"{tool} -P FORWARD ACCEPT; {tool} -F; {tool} -X; nft flush ruleset")


def test_none_has_loopback_alone(setup: Setup, container: int) -> None:
    state = setup("none", container)
    links = json.loads(networks.inside(container, "ip", "-json", "link"))
    assert [(link["ifname"], "UP" in link["flags"]) for link in links] == [("lo", True)]
    assert (state["helper"], state["address"]) == (None, None)


def test_host_changes_nothing(setup: Setup) -> None:
    before = networks.interfaces()
    setup("host", os.getpid())
    assert networks.interfaces() == before


def test_a_mode_that_is_not(setup: Setup, container: int) -> None:
    with pytest.raises(ContainerStartError, match="no network mode `bridge`"):
        setup("bridge", container)


def test_a_process_that_is_gone_leaves_nothing(setup: Setup) -> None:
    with networks.container() as pid:
        pass
    with pytest.raises(ContainerStartError, match="cannot be set up"):
        setup("private", pid)


def test_many_at_once(host: None, tmp_path: Path) -> None:
    """Processes that start containers at the same time give each its own address."""
    script = f"""
import sys
sys.path.insert(0, {str(networks.REPOSITORY)!r})
from mlenv.container import net
net.LOCK = {net.LOCK!r}
state = net.setup("private", sys.argv[1], int(sys.argv[2]), rootless=False, state_dir={str(tmp_path)!r})
print(state["address"], flush=True)
sys.stdin.read()
net.teardown(state)
"""
    ids = [secrets.token_hex(32) for _ in range(5)]
    running = []
    containers = [
        subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in ids
    ]
    try:
        for name, stand_in in zip(ids, containers, strict=True):
            stand_in.stdin.write(b"\n")
            stand_in.stdin.flush()
            stand_in.stdout.readline()
            line = [sys.executable, "-I", "-S", "-c", script, name, str(stand_in.pid)]
            running.append(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        addresses = [starter.stdout.readline().strip() for starter in running]
        assert len(set(addresses)) == len(ids)
        assert b"" not in addresses
    finally:
        for starter in running:
            starter.communicate()
        for stand_in in containers:
            stand_in.kill()
            stand_in.communicate()


def test_names_where_the_host_resolves_on_its_loopback(
    host: None, setup: Setup, container: int, tmp_path: Path
) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\nsearch example.org\n")
    with networks.process(sys.executable, "-c", networks.NAME_SERVER, "127.0.0.1"):
        state = setup("private", container)
        assert net.resolv_conf("private") == b"nameserver 10.0.2.3\nsearch example.org\n"
        answer = networks.inside(
            container, sys.executable, "-c", networks.ASK_NAME, net.DNS_FORWARDER, "example.org"
        )
        assert answer.strip() == "answer to example.org"
        net.teardown(state)
        assert not is_alive(state["relay"])


def test_names_over_tcp_where_the_host_resolves_on_its_loopback(
    host: None, setup: Setup, container: int, tmp_path: Path
) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    serve = "import socket; s = socket.create_server(('127.0.0.1', 53)); print('up', flush=True); "
    serve += "c, _ = s.accept(); c.sendall(c.recv(100).upper()); c.close()"
    with networks.process(sys.executable, "-c", serve):
        setup("private", container)
        ask = "import socket; s = socket.create_connection(('10.0.2.3', 53), 5); "
        ask += "s.sendall(b'name'); print(s.recv(9))"
        assert networks.inside(container, sys.executable, "-c", ask).strip() == "b'NAME'"


def test_the_relay_dies_with_the_shim(host: None, container: int, tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    reading, writing = os.pipe()
    shim = os.fork()
    if shim == 0:
        state = net.setup("private", "f" * 64, container, rootless=False, state_dir=str(tmp_path))
        os.write(writing, json.dumps(state).encode())
        signal.pause()
    state = json.loads(os.read(reading, 65536))
    os.close(reading)
    os.close(writing)
    assert is_alive(state["relay"])
    os.kill(shim, signal.SIGKILL)
    os.waitpid(shim, 0)
    networks.until(lambda: not is_alive(state["relay"]), "the relay ends")
    assert net.BRIDGE in networks.interfaces()
    net.teardown(state)
