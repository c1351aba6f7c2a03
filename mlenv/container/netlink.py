"""Netlink as bytes: the few rtnetlink and nf_tables messages that starting a container sends.

Values in, bytes out, and one socket that sends them and raises what the kernel answers. What the messages
mean for a container is in `net`. pyroute2 speaks all of netlink, but importing it takes longer than
starting a container, and the container core has no site-packages; it is the oracle in this module's tests.

Source: rtnetlink(7), netlink(7), linux/if_link.h, linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")

_REQUEST, _ACK, _EXCL, _CREATE, _APPEND, _DUMP = 0x1, 0x4, 0x200, 0x400, 0x800, 0x300
_ERROR, _DONE = 2, 3

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _GETADDR = 20, 22
_NEWROUTE, _GETROUTE = 24, 26

_AF_INET = 2
_IFF_UP = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER = 1, 3, 4, 10
_IFLA_LINKINFO, IFLA_IFALIAS, _IFLA_NET_NS_FD = 18, 20, 28
_INFO_KIND, _INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF


# --- attributes


def attribute(kind: int, payload: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def text(kind: int, value: str) -> bytes:
    """Return an attribute of a NUL-terminated string."""
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds others."""
    return attribute(kind | _NESTED, b"".join(attributes))


def _be32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes in `data` by their kind; of several of one kind, the last."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:  # noqa: PLR2004 - the size of the attribute's own header
            break
        found[kind & _TYPE_MASK] = data[at + 4 : at + length]
        at += length + (-length % 4)
    return found


# --- sockets


class Netlink:
    """A netlink socket; it stays in the network namespace it was opened in, wherever its process goes.

    `protocol`: NETLINK_ROUTE or NETLINK_NETFILTER.
    """

    def __init__(self, protocol: int) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Netlink:  # noqa: PYI034 - typing costs 12 ms; nothing derives from this
        """Return the socket; leaving closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, kind: int, flags: int, body: bytes) -> None:
        """Send a message and wait for the kernel's word.

        Raises: OSError with the kernel's errno.
        """
        self._sequence += 1
        self._socket.send(_message(kind, flags | _REQUEST | _ACK, self._sequence, body))
        for _ in self._answers(self._sequence):
            pass

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Return the bodies of everything the kernel has of this kind."""
        self._sequence += 1
        self._socket.send(_message(kind, _REQUEST | _DUMP, self._sequence, body))
        return list(self._answers(self._sequence))

    def batch(self, messages: Iterable[tuple[int, int, bytes]]) -> None:
        """Apply nf_tables `messages` (kind, flags, body): all of them, or none.

        Raises: OSError with the errno of the first message that failed.
        """
        boundary = struct.pack(">BBH", 0, 0, _NFT)
        first = self._sequence + 1
        parts = [_message(_BATCH_BEGIN, _REQUEST, first, boundary)]
        for number, (kind, flags, body) in enumerate(messages, first + 1):
            parts.append(_message(kind, flags | _REQUEST | _ACK, number, body))
        self._sequence = first + len(parts)
        parts.append(_message(_BATCH_END, _REQUEST, self._sequence, boundary))
        self._socket.send(b"".join(parts))
        for number in range(first + 1, self._sequence):
            for _ in self._answers(number):
                pass

    def _answers(self, sequence: int) -> Iterator[bytes]:
        """Yield the bodies that answer `sequence`, until the kernel says it is done."""
        while True:
            for kind, number, body in _split(self._socket.recv(1 << 20)):
                if kind == _ERROR and number <= sequence:
                    errno = -struct.unpack_from("=i", body)[0]
                    if errno:
                        raise OSError(errno, os.strerror(errno))
                    if number == sequence:
                        return
                elif number == sequence:
                    if kind == _DONE:
                        return
                    yield body


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def _split(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        yield kind, sequence, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


# --- links, addresses, routes


class Link:
    """A network interface as the kernel describes it."""

    __slots__ = ("alias", "index", "kind", "master", "mtu", "name", "up")

    def __init__(self, body: bytes) -> None:
        _, _, self.index, flags, _ = _LINK.unpack_from(body)
        found = attributes(body[_LINK.size :])
        self.up = bool(flags & _IFF_UP)
        self.name = found[IFLA_IFNAME].rstrip(b"\0").decode()
        self.alias = found.get(IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace")
        self.master = struct.unpack("=I", found.get(IFLA_MASTER, bytes(4)))[0]
        self.mtu = struct.unpack("=I", found.get(IFLA_MTU, bytes(4)))[0]
        self.kind = attributes(found.get(_IFLA_LINKINFO, b"")).get(_INFO_KIND, b"").rstrip(b"\0").decode()


def links(route: Netlink) -> list[Link]:
    """Return all interfaces of the socket's namespace."""
    return [Link(body) for body in route.dump(_GETLINK, _LINK.pack(0, 0, 0, 0, 0))]


def addresses(route: Netlink) -> list[tuple[int, bytes, int]]:
    """Return (interface index, IPv4 address, prefix length) of every address."""
    found = []
    for body in route.dump(_GETADDR, _ADDRESS.pack(_AF_INET, 0, 0, 0, 0)):
        _, prefix, _, _, index = _ADDRESS.unpack_from(body)
        values = attributes(body[_ADDRESS.size :])
        found.append((index, values.get(2, values.get(1, bytes(4))), prefix))
    return found


def routes(route: Netlink) -> list[tuple[bytes, int, int]]:
    """Return (IPv4 destination, prefix length, interface index) of every route in every table."""
    found = []
    for body in route.dump(_GETROUTE, _ROUTE.pack(_AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)):
        prefix = body[1]
        values = attributes(body[_ROUTE.size :])
        found.append((values.get(1, bytes(4)), prefix, struct.unpack("=i", values.get(4, bytes(4)))[0]))
    return found


def add_bridge(route: Netlink, name: str, *, mac: bytes, mtu: int) -> None:
    """Make a bridge and bring it up; with a fixed `mac` it keeps it while ports come and go."""
    body = _LINK.pack(0, 0, 0, _IFF_UP, _IFF_UP) + text(IFLA_IFNAME, name) + attribute(IFLA_ADDRESS, mac)
    body += _u32(IFLA_MTU, mtu) + nested(_IFLA_LINKINFO, text(_INFO_KIND, "bridge"))
    route.request(_NEWLINK, _CREATE | _EXCL, body)


def add_veth(
    route: Netlink, name: str, *, master: int, peer: str, peer_netns_fd: int, mac: bytes, mtu: int
) -> None:
    """Make a pair of interfaces: `name`, up, a port of bridge `master`; `peer`, down, elsewhere."""
    up = _LINK.pack(0, 0, 0, _IFF_UP, _IFF_UP)
    other = _LINK.pack(0, 0, 0, 0, 0) + text(IFLA_IFNAME, peer) + attribute(IFLA_ADDRESS, mac)
    other += _u32(_IFLA_NET_NS_FD, peer_netns_fd) + _u32(IFLA_MTU, mtu)
    data = nested(_INFO_DATA, attribute(_VETH_INFO_PEER | _NESTED, other))
    body = up + text(IFLA_IFNAME, name) + _u32(IFLA_MASTER, master) + _u32(IFLA_MTU, mtu)
    route.request(_NEWLINK, _CREATE | _EXCL, body + nested(_IFLA_LINKINFO, text(_INFO_KIND, "veth"), data))


def set_alias(route: Netlink, name: str, alias: str) -> None:
    """Write a remark on an interface; it lives and dies with it."""
    body = _LINK.pack(0, 0, 0, 0, 0) + text(IFLA_IFNAME, name) + attribute(IFLA_IFALIAS, alias.encode())
    route.request(_NEWLINK, 0, body)


def set_up(route: Netlink, index: int) -> None:
    """Bring an interface up."""
    route.request(_NEWLINK, 0, _LINK.pack(0, 0, index, _IFF_UP, _IFF_UP))


def delete_link(route: Netlink, name: str) -> None:
    """Delete an interface. Raises: OSError (ENODEV) where there is none."""
    route.request(_DELLINK, 0, _LINK.pack(0, 0, 0, 0, 0) + text(IFLA_IFNAME, name))


def add_address(route: Netlink, index: int, address: bytes, prefix: int) -> None:
    """Give an interface an IPv4 address with its broadcast address."""
    values = attribute(2, address) + attribute(1, address)
    host_bits = (1 << (32 - prefix)) - 1
    if host_bits:
        values += attribute(4, struct.pack(">I", int.from_bytes(address, "big") | host_bits))
    route.request(_NEWADDR, _CREATE | _EXCL, _ADDRESS.pack(_AF_INET, prefix, 0, 0, index) + values)


def add_default_route(route: Netlink, gateway: bytes) -> None:
    """Send everything without a route of its own to `gateway`."""
    main_table, protocol_boot, unicast = 254, 3, 1
    body = _ROUTE.pack(_AF_INET, 0, 0, 0, main_table, protocol_boot, 0, unicast, 0) + attribute(5, gateway)
    route.request(_NEWROUTE, _CREATE | _EXCL, body)


# --- nf_tables

_NFT = 10
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _NEWRULE = 0xA00, 0xA02, 0xA03, 0xA04, 0xA06
_VERDICT_REGISTER, _REGISTER = 0, 1
_EQUAL, _NOT_EQUAL = 0, 1
_DROP = 0
FORWARD, POSTROUTING = 2, 4
IIFNAME, OIFNAME = 6, 7


def _nft_family() -> bytes:
    return struct.pack(">BBH", _AF_INET, 0, 0)


def _expression(name: str, *values: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *values))


def _compare(operator: int, value: bytes) -> bytes:
    return _expression("cmp", _be32(1, _REGISTER), _be32(2, operator), nested(3, attribute(1, value)))


def match_interface(key: int, name: str, *, equal: bool) -> bytes:
    """Match packets whose IIFNAME or OIFNAME (`key`) is, or is not, `name`."""
    load = _expression("meta", _be32(1, _REGISTER), _be32(2, key))
    return load + _compare(_EQUAL if equal else _NOT_EQUAL, name.encode().ljust(16, b"\0"))


def match_source(network: bytes) -> bytes:
    """Match packets from the IPv4 network whose leading bytes (1 to 4) are `network`."""
    network_header, source_offset = 1, 12
    where = (_be32(2, network_header), _be32(3, source_offset), _be32(4, len(network)))
    return _expression("payload", _be32(1, _REGISTER), *where) + _compare(_EQUAL, network)


def match_unsolicited() -> bytes:
    """Match packets that belong to no connection that was made before."""
    ct_state_key, established_or_related = 0, struct.pack("=I", 2 | 4)
    load = _expression("ct", _be32(1, _REGISTER), _be32(2, ct_state_key))
    registers = (_be32(1, _REGISTER), _be32(2, _REGISTER), _be32(3, 4))
    mask = (nested(4, attribute(1, established_or_related)), nested(5, attribute(1, bytes(4))))
    return load + _expression("bitwise", *registers, *mask) + _compare(_EQUAL, bytes(4))


def masquerade() -> bytes:
    """Give packets the address of the interface they leave by."""
    return _expression("masq")


def drop() -> bytes:
    """Drop packets."""
    verdict = nested(2, nested(2, _be32(1, _DROP)))
    return _expression("immediate", _be32(1, _VERDICT_REGISTER), verdict)


def new_table(name: str) -> tuple[int, int, bytes]:
    """Make an IPv4 table, or keep the one there is."""
    return _NEWTABLE, _CREATE, _nft_family() + text(1, name)


def delete_table(name: str) -> tuple[int, int, bytes]:
    """Delete an IPv4 table with its chains and rules."""
    return _DELTABLE, 0, _nft_family() + text(1, name)


def new_chain(table: str, name: str, *, kind: str, hook: int, priority: int) -> tuple[int, int, bytes]:
    """Make a chain of `kind` ("nat" or "filter") at a hook."""
    where = nested(4, _be32(1, hook), _be32(2, priority))
    return _NEWCHAIN, _CREATE, _nft_family() + text(1, table) + text(3, name) + where + text(7, kind)


def new_rule(table: str, chain: str, *expressions: bytes) -> tuple[int, int, bytes]:
    """Append a rule to a chain."""
    where = text(1, table) + text(2, chain)
    return _NEWRULE, _CREATE | _APPEND, _nft_family() + where + nested(4, *expressions)


def chains(netfilter: Netlink) -> dict[tuple[str, str], int | None]:
    """Return the policy (0 drop, 1 accept, None for chains without) of each IPv4 chain by (table, chain)."""
    found: dict[tuple[str, str], int | None] = {}
    for body in netfilter.dump(_GETCHAIN, _nft_family()):
        values = attributes(body[4:])
        policy = values.get(5)
        name = values[1].rstrip(b"\0").decode(), values[3].rstrip(b"\0").decode()
        found[name] = struct.unpack(">I", policy)[0] if policy else None
    return found
