"""Netlink messages as bytes, against pyroute2, which we did not write."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlenv.container import netlink


class Recorder(netlink.Netlink):
    """A socket that keeps what would be sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, bytes]] = []

    def request(self, kind: int, flags: int, body: bytes) -> None:
        self.sent.append((kind, flags, body))


def decoded(recorder: Recorder, kind: type) -> object:
    """Return the one message that was recorded, as pyroute2's class `kind` reads it."""
    ((number, flags, body),) = recorder.sent
    message = kind(struct.pack("=IHHII", 16 + len(body), number, flags, 1, 0) + body)
    message.decode()
    return message


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=200), max_size=8))
def test_attributes_are_read_as_they_were_written(found: dict[int, bytes]) -> None:
    data = b"".join(netlink.attribute(kind, value) for kind, value in found.items())
    assert len(data) % 4 == 0
    assert netlink.attributes(data) == found


@given(st.binary(max_size=100))
def test_any_bytes_are_read_to_an_end(data: bytes) -> None:
    netlink.attributes(data)


def test_a_veth_pair() -> None:
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

    recorder = Recorder()
    netlink.add_veth(
        recorder,
        "mlenvabc",
        master=7,
        peer="eth0",
        peer_netns_fd=9,
        mac=b"\x02\x6d\x0a\xcf\x00\x02",
        mtu=1400,
    )
    message = decoded(recorder, ifinfmsg)
    assert message.get_attr("IFLA_IFNAME") == "mlenvabc"
    assert message.get_attr("IFLA_MASTER") == 7
    assert message.get_attr("IFLA_MTU") == 1400
    assert message["flags"] == message["change"] == 1
    info = message.get_attr("IFLA_LINKINFO")
    assert info.get_attr("IFLA_INFO_KIND") == "veth"
    peer = info.get_attr("IFLA_INFO_DATA").get_attr("VETH_INFO_PEER")
    assert peer.get_attr("IFLA_IFNAME") == "eth0"
    assert peer.get_attr("IFLA_NET_NS_FD") == 9
    assert peer.get_attr("IFLA_ADDRESS") == "02:6d:0a:cf:00:02"
    assert peer["flags"] == 0


def test_an_address() -> None:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    recorder = Recorder()
    netlink.add_address(recorder, 3, bytes([10, 207, 0, 2]), 24)
    message = decoded(recorder, ifaddrmsg)
    assert (message["index"], message["prefixlen"]) == (3, 24)
    assert message.get_attr("IFA_LOCAL") == "10.207.0.2"
    assert message.get_attr("IFA_BROADCAST") == "10.207.0.255"


def test_an_address_of_one_host_has_no_broadcast() -> None:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

    recorder = Recorder()
    netlink.add_address(recorder, 1, bytes([10, 0, 2, 3]), 32)
    assert decoded(recorder, ifaddrmsg).get_attr("IFA_BROADCAST") is None


def test_a_default_route() -> None:
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    recorder = Recorder()
    netlink.add_default_route(recorder, bytes([10, 207, 0, 1]))
    message = decoded(recorder, rtmsg)
    assert (message["dst_len"], message["table"], message["type"]) == (0, 254, 1)
    assert message.get_attr("RTA_GATEWAY") == "10.207.0.1"


def test_loopback_is_the_first_interface() -> None:
    with netlink.Netlink(netlink.NETLINK_ROUTE) as route:
        assert [(link.name, link.index) for link in netlink.links(route) if link.index == 1] == [("lo", 1)]


def test_the_kernels_refusal_is_an_oserror() -> None:
    with netlink.Netlink(netlink.NETLINK_ROUTE) as route:
        with pytest.raises(OSError, match=r"No such device|not permitted"):
            netlink.delete_link(route, "nosuchlink")
        assert netlink.links(route)  # the socket is still good


def test_starting_a_container_imports_nothing_heavy() -> None:
    heavy = {
        "asyncio",
        "collections",
        "ctypes.util",
        "enum",
        "json",
        "logging",
        "pathlib",
        "pyroute2",
        "re",
        "socket",
    }
    heavy |= {
        "contextlib",
        "dataclasses",
        "functools",
        "selectors",
        "signal",
        "subprocess",
        "threading",
        "typing",
    }
    root = netlink.__file__.rpartition("/mlenv/")[0]
    script = f"import sys; sys.path.insert(0, {root!r}); from mlenv.container import net, forward, dns; "
    script += "print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    )
    assert heavy & set(done.stdout.split()) == set()
