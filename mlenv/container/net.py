"""The network of a container: its own with a way out, its own without one, or the host's.

| mode    | as root                               | as a user                                              |
|---------|---------------------------------------|--------------------------------------------------------|
| private | bridge `mlenv0`, a veth, masquerading | pasta, else slirp4netns, else a warning and no way out |
| none    | loopback                              | loopback                                               |
| host    | the host's                            | the host's                                             |

What containers of root share (bridge, masquerading, the firewall's leave to pass) is made by the first and
removed by the last. The addresses in use are written on the host's ends of the pairs, as their aliases: the
kernel frees them when a container's network namespace goes, however it ended. All of it is changed under
one lock.

Source: veth(4), linux/if_link.h; pasta(1); slirp4netns(1); OCI runtime-spec has no field for any of this.
"""

from __future__ import annotations

import fcntl
import os
from errno import EACCES, ENODEV, ENOENT, EOPNOTSUPP, EPERM, EPROTONOSUPPORT, EROFS

from mlenv.container import companion, namespaces, netlink, syscalls
from mlenv.errors import ContainerStartError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    NetState = dict[str, Any]

BRIDGE = "mlenv0"
TABLE = "mlenv"
INTERFACE = "eth0"
DNS_FORWARDER = "10.0.2.3"
"""Where pasta and slirp4netns answer names for a container whose host resolves on its own loopback."""

LOCK = "/run/mlenv/network.lock"
"""One for the host: the bridge is, whatever MLENV_HOME says."""

_POOLS = ((10, 207), (172, 29), (192, 168))
"""The /16 networks in which a free /24 is looked for; away from those of Docker, Podman and libvirt."""

_DEFAULT_ROUTE_PREFIX = 4
"""Routes this wide or wider (VPNs split the default route) do not make an address taken."""

_PREFIX = 24
_FIRST_HOST, _LAST_HOST = 2, 254
_HELPER_TIMEOUT = 10.0
_REFUSED = (EPERM, EACCES, EROFS, EOPNOTSUPP, EPROTONOSUPPORT, ENOENT)
_RESOLVED_STUB = "127.0.0.53"
RESOLV_CONF = "/etc/resolv.conf"
RESOLVED_UPSTREAM = "/run/systemd/resolve/resolv.conf"


def setup(mode: str, container_id: str, netns_pid: int, *, rootless: bool, state_dir: str) -> NetState:
    """Give the network namespace of process `netns_pid` its network, and return what `teardown` needs.

    To be called in the host's namespaces by a single-threaded process, which the helpers die with.
    `state_dir` gets the helpers' logs. The result is plain JSON: `mode`, `helper` (bridge, pasta,
    slirp4netns or None), `address` of the container or None, `warnings` and `notes` for the user, and names
    of what was made.

    Raises: ContainerStartError, with everything that was made removed.
    """
    if mode not in ("private", "none", "host"):
        raise ContainerStartError(f"there is no network mode `{mode}`", hint="use private, none or host")
    state: NetState = {"mode": mode, "container": container_id, "helper": None, "address": None}
    state |= {"warnings": [], "notes": []}
    try:
        if mode == "none":
            _loopback(netns_pid, rootless=rootless, state_dir=state_dir)
        elif mode == "private" and rootless:
            _user_network(state, netns_pid, state_dir)
        elif mode == "private":
            _bridge_network(state, netns_pid)
            _relay_names(state, netns_pid, state_dir)
    except OSError as error:
        teardown(state)
        raise ContainerStartError("the container's network cannot be set up", cause=str(error)) from error
    except ContainerStartError:
        teardown(state)
        raise
    return state


def teardown(state: NetState) -> None:
    """Remove what `setup` made; again or after the shim was killed, it finishes what is left."""
    process = state.get("process")
    if process:
        companion.end(process)
    relay = state.get("relay")
    if relay:
        companion.end(relay)
    if state.get("veth"):
        _disconnect(state["veth"], state["container"])


# --- any mode


def _loopback(netns_pid: int, *, rootless: bool, state_dir: str) -> None:
    """Bring `lo` up in the container; as a user that takes a process that joins its user namespace."""
    if not rootless:
        with _netlink_of(netns_pid) as inside:
            netlink.set_up(inside, 1)
        return
    parent = os.getpid()

    def bring_up(_: Callable[[], None]) -> None:
        companion.join_namespaces(netns_pid, parent, rootless=True)
        with netlink.Netlink(netlink.NETLINK_ROUTE) as inside:
            netlink.set_up(inside, 1)

    companion.end(companion.start(bring_up, log=f"{state_dir}/network.log"))


def _netlink_of(netns_pid: int) -> netlink.Netlink:
    """Return a socket that was opened in the network namespace of `netns_pid`; we are back in ours."""
    own_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        target_fd = os.open(f"/proc/{netns_pid}/ns/net", os.O_RDONLY)
        try:
            syscalls.setns(target_fd, syscalls.CLONE_NEWNET)
            try:
                return netlink.Netlink(netlink.NETLINK_ROUTE)
            finally:
                syscalls.setns(own_fd, syscalls.CLONE_NEWNET)
        finally:
            os.close(target_fd)
    finally:
        os.close(own_fd)


# --- root: a bridge


class _lock:  # noqa: N801 - reads as what it does
    """Exclusive leave to change the host's network for containers; freed with its holder."""

    def __enter__(self) -> None:
        os.makedirs(os.path.dirname(LOCK), mode=0o700, exist_ok=True)
        self._fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _bridge_network(state: NetState, netns_pid: int) -> None:
    with _netlink_of(netns_pid) as inside:
        netlink.set_up(inside, 1)
        try:
            address = _connect(state, netns_pid)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            _disconnect(state.pop("veth"), state["container"])
            state["warnings"].append(f"the container has no way out: the host refused it a bridge ({error})")
            return
        index = next(link.index for link in netlink.links(inside) if link.name == INTERFACE)
        netlink.add_address(inside, index, address, _PREFIX)
        netlink.set_up(inside, index)
        netlink.add_default_route(inside, address[:3] + b"\x01")
    state.update(helper="bridge", address=_dotted(address), gateway=_dotted(address[:3] + b"\x01"))


def _connect(state: NetState, netns_pid: int) -> bytes:
    """Make the pair of interfaces between bridge and container, and return the container's address."""
    netns_fd = os.open(f"/proc/{netns_pid}/ns/net", os.O_RDONLY)
    name = state["veth"] = f"mlenv{state['container'][:10]}"
    try:
        with _lock(), netlink.Netlink(netlink.NETLINK_ROUTE) as route:
            bridge, network = _ensure_bridge(state, route)
            address = _free_address(route, bridge.index, network)
            mac = b"\x02\x6d" + address
            ends = {"master": bridge.index, "peer_netns_fd": netns_fd, "mtu": bridge.mtu}
            netlink.add_veth(route, name, peer=INTERFACE, mac=mac, **ends)
            netlink.set_alias(route, name, f"mlenv {_dotted(address)} {state['container']}")
            return address
    finally:
        os.close(netns_fd)


def _disconnect(veth: str, container_id: str) -> None:
    """Remove the pair of interfaces, and what containers share where it was the last."""
    with _lock(), netlink.Netlink(netlink.NETLINK_ROUTE) as route:
        _remove_veth(route, veth, container_id)
        _remove_bridge_if_unused(route)


def _ensure_bridge(state: NetState, route: netlink.Netlink) -> tuple[netlink.Link, bytes]:
    """Return the bridge and the three leading bytes of its network.

    Each step is done only where its result is missing: what a killed process or a firewall's reload left is
    mended.
    """
    bridge = _link(route, BRIDGE) or _add_bridge(route)
    found = (address[:3] for index, address, _ in netlink.addresses(route) if index == bridge.index)
    network = next(found, None)
    if network is None:
        network = _free_network(route)
        netlink.add_address(route, bridge.index, network + b"\x01", _PREFIX)
    translated = (TABLE, "postrouting") in _chains()
    if not translated:
        _install_masquerade(network)
    if not translated or not bridge.alias:
        _open_firewall(state, route)
    _enable_forwarding(state)
    return bridge, network


def _add_bridge(route: netlink.Netlink) -> netlink.Link:
    netlink.add_bridge(route, BRIDGE, mac=b"\x02\x6d" + BRIDGE.encode()[:4], mtu=_uplink_mtu(route))
    return next(link for link in netlink.links(route) if link.name == BRIDGE)


def _link(route: netlink.Netlink, name: str) -> netlink.Link | None:
    return next((link for link in netlink.links(route) if link.name == name), None)


def _uplink_mtu(route: netlink.Netlink) -> int:
    """Return the MTU of the interface that the default route leaves by, 1500 where there is none."""
    uplink = next((index for _, prefix, index in netlink.routes(route) if prefix == 0 and index), None)
    return next((link.mtu for link in netlink.links(route) if link.index == uplink), 1500)


def _free_network(route: netlink.Netlink) -> bytes:
    """Return the leading three bytes of the first /24 of our pools that no route and no name server is in."""
    routes = netlink.routes(route)
    taken = [(target, prefix) for target, prefix, _ in routes if prefix > _DEFAULT_ROUTE_PREFIX]
    servers = _nameservers(_read(RESOLV_CONF))
    taken += [(_packed(server), 32) for server in servers if server.count(".") == 3]  # noqa: PLR2004 - IPv4
    for first, second in _POOLS:
        for third in range(256):
            network = bytes((first, second, third))
            if not any(_overlap(network + b"\0", _PREFIX, target, prefix) for target, prefix in taken):
                return network
    raise ContainerStartError(
        "no private network is free for containers",
        cause="the host's routes cover " + ", ".join(f"{first}.{second}.0.0/16" for first, second in _POOLS),
        hint="use `network: host`, or remove routes",
    )


def _overlap(one: bytes, one_prefix: int, other: bytes, other_prefix: int) -> bool:
    shift = 32 - min(one_prefix, other_prefix)
    return int.from_bytes(one, "big") >> shift == int.from_bytes(other, "big") >> shift


def _free_address(route: netlink.Netlink, bridge_index: int, network: bytes) -> bytes:
    """Return the first address of the bridge's network that no port of the bridge is marked with."""
    used = {link.alias.split(" ")[1] for link in netlink.links(route) if _is_ours(link, bridge_index)}
    for host in range(_FIRST_HOST, _LAST_HOST + 1):
        address = network + bytes((host,))
        if _dotted(address) not in used:
            return address
    raise ContainerStartError(
        "no address is left for another container",
        cause=f"all {_LAST_HOST - _FIRST_HOST + 1} of {_dotted(network + bytes(1))}/{_PREFIX} are in use",
        hint="stop a container, or use `network: host`",
    )


def _is_ours(link: netlink.Link, bridge_index: int) -> bool:
    return link.master == bridge_index and link.alias.startswith("mlenv ")


def _remove_veth(route: netlink.Netlink, name: str, container_id: str) -> None:
    link = _link(route, name)
    if link is None or (link.alias and not link.alias.endswith(f" {container_id}")):
        return
    try:
        netlink.delete_link(route, name)
    except OSError as error:
        if error.errno != ENODEV:  # its other end went with the container's namespace just now
            raise


def _remove_bridge_if_unused(route: netlink.Netlink) -> None:
    """Remove what containers share once none uses it."""
    bridge = _link(route, BRIDGE)
    if bridge is None or any(link.master == bridge.index for link in netlink.links(route)):
        return
    _close_firewall(bridge.alias)
    if (TABLE, "postrouting") in _chains():
        with netlink.Netlink(netlink.NETLINK_NETFILTER) as netfilter:
            netfilter.batch([netlink.delete_table(TABLE)])
    netlink.delete_link(route, BRIDGE)


def _relay_names(state: NetState, netns_pid: int, state_dir: str) -> None:
    """Start a relay where the host's name servers are all on its loopback, where the bridge does not lead."""
    servers = _host_nameservers()[0]
    if state["helper"] == "bridge" and servers and all(_is_local(server) for server in servers):
        from mlenv.container import dns

        state["relay"] = dns.start(DNS_FORWARDER, servers, netns_pid, log=f"{state_dir}/dns.log")


# --- root: translation and the host's firewall


def _chains() -> dict[tuple[str, str], int | None]:
    with netlink.Netlink(netlink.NETLINK_NETFILTER) as netfilter:
        return netlink.chains(netfilter)


def _install_masquerade(network: bytes) -> None:
    """Replace our table: containers leave with the host's address, and nobody outside begins a connection."""
    leaving = (netlink.match_source(network), netlink.match_interface(netlink.OIFNAME, BRIDGE, equal=False))
    entering = (
        netlink.match_interface(netlink.OIFNAME, BRIDGE, equal=True),
        netlink.match_interface(netlink.IIFNAME, BRIDGE, equal=False),
        netlink.match_unsolicited(),
    )
    leave = netlink.new_chain(TABLE, "postrouting", kind="nat", hook=netlink.POSTROUTING, priority=100)
    enter = netlink.new_chain(TABLE, "forward", kind="filter", hook=netlink.FORWARD, priority=0)
    with netlink.Netlink(netlink.NETLINK_NETFILTER) as netfilter:
        netfilter.batch(
            [
                netlink.new_table(TABLE),
                netlink.delete_table(TABLE),
                netlink.new_table(TABLE),
                leave,
                netlink.new_rule(TABLE, "postrouting", *leaving, netlink.masquerade()),
                enter,
                netlink.new_rule(TABLE, "forward", *entering, netlink.drop()),
            ]
        )


def _enable_forwarding(state: NetState) -> None:
    """Let the host route; it stays so, since others may rely on it by the time the last container goes."""
    path = "/proc/sys/net/ipv4/ip_forward"
    if _read(path).strip() == "1":
        return
    switch_fd = os.open(path, os.O_WRONLY)
    try:
        os.write(switch_fd, b"1")
    finally:
        os.close(switch_fd)
    state["notes"].append("switched on net.ipv4.ip_forward, which containers need to reach the network")


def _open_firewall(state: NetState, route: netlink.Netlink) -> None:
    """Let containers through where the host's firewall drops what it forwards, as Docker makes it.

    An accept in a table of our own does not undo a drop in another, so the rules go into Docker's chain for
    the rules of others, or into FORWARD itself. The bridge's alias says where they are.
    """
    where = _firewall()
    if where is None:
        netlink.set_alias(route, BRIDGE, "mlenv")
        return
    tool, chain = where
    path = namespaces.find_program(tool)
    if path is None:
        why = f"the firewall's chain {chain} may drop its packets and `{tool}` is not installed"
        state["warnings"].append(f"the container may have no way out: {why}")
        return
    for rule in _firewall_rules():
        if companion.run_program(path, "-w", "5", "-C", chain, *rule) != 0:
            companion.run_program(path, "-w", "5", "-I", chain, *rule)
    netlink.set_alias(route, BRIDGE, f"mlenv {tool} {chain}")


def _firewall() -> tuple[str, str] | None:
    """Return (tool, chain) that must let us pass, or None where nothing drops."""
    chains = _chains()
    if ("filter", "DOCKER-USER") in chains:
        return "iptables-nft" if namespaces.find_program("iptables-nft") else "iptables", "DOCKER-USER"
    if chains.get(("filter", "FORWARD")) == 0:
        return "iptables-nft" if namespaces.find_program("iptables-nft") else "iptables", "FORWARD"
    if "filter" in _read("/proc/net/ip_tables_names").split():
        tool = namespaces.find_program("iptables-legacy")
        if tool and companion.run_program(tool, "-w", "5", "-S", "DOCKER-USER") == 0:
            return "iptables-legacy", "DOCKER-USER"
    return None


def _firewall_rules() -> Iterator[list[str]]:
    mark = ["-m", "comment", "--comment", "mlenv", "-j", "ACCEPT"]
    yield ["-i", BRIDGE, *mark]
    yield ["-o", BRIDGE, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", *mark]


def _close_firewall(alias: str) -> None:
    words = alias.split(" ")
    path = namespaces.find_program(words[1]) if len(words) == 3 else None  # noqa: PLR2004 - "mlenv TOOL CHAIN"
    if path:
        for rule in _firewall_rules():
            companion.run_program(path, "-w", "5", "-D", words[2], *rule)


# --- a user: pasta or slirp4netns


def _user_network(state: NetState, netns_pid: int, state_dir: str) -> None:
    """Start the first helper that works; without one there is loopback alone, and a warning."""
    failures = []
    for name, begin in (("pasta", _start_pasta), ("slirp4netns", _start_slirp4netns)):
        path = namespaces.find_program(name)
        if path is None:
            continue
        log = f"{state_dir}/{name}.log"
        try:
            state["process"] = begin(path, netns_pid, state_dir, log)
        except OSError as error:
            failures.append(f"{name}: {error}")
            continue
        state.update(helper=name, address=_address_of(netns_pid))
        return
    _loopback(netns_pid, rootless=True, state_dir=state_dir)
    why = "; ".join(failures) or "install the package `passt` (or `slirp4netns`)"
    state["warnings"].append(f"the container has no way out to the network: {why}")


def pasta_arguments(netns_pid: int, pid_file: str) -> list[str]:
    """Return pasta's arguments: the way out, and nothing else.

    No port is forwarded in either direction and the gateway's address does not lead to the host's loopback;
    pasta does both by default. Source: pasta(1); the options mean the same from 2023_03_09 to 2025.
    """
    no_ports = ("-t", "none", "-u", "none", "-T", "none", "-U", "none")
    names = ("--config-net", "--no-map-gw", "--dns-forward", DNS_FORWARDER)
    return ["--foreground", "--quiet", *names, *no_ports, "--pid", pid_file, str(netns_pid)]


def _start_pasta(path: str, netns_pid: int, state_dir: str, log: str) -> companion.Identity:
    """Start pasta and return once the namespace is configured: then it writes its pid, into our FIFO."""
    fifo = f"{state_dir}/pasta.pid"
    try:
        os.mkfifo(fifo, 0o600)
    except FileExistsError:
        os.unlink(fifo)
        os.mkfifo(fifo, 0o600)
    ready_fd = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _start_helper([path, *pasta_arguments(netns_pid, fifo)], ready_fd, log)
    finally:
        os.close(ready_fd)
        os.unlink(fifo)


def _start_slirp4netns(path: str, netns_pid: int, state_dir: str, log: str) -> companion.Identity:
    del state_dir
    ready_fd, tell_fd = os.pipe()
    options = ["--configure", "--mtu=65520", "--disable-host-loopback", f"--ready-fd={tell_fd}"]
    try:
        return _start_helper([path, *options, str(netns_pid), INTERFACE], ready_fd, log, tell_fd)
    finally:
        os.close(ready_fd)
        os.close(tell_fd)


def _start_helper(args: list[str], ready_fd: int, log: str, *keep: int) -> companion.Identity:
    """Execute a helper and wait for its first byte on `ready_fd`.

    Raises: OSError with the last line of its log where it ends before that, or takes longer than ten seconds.
    """

    def execute(_: Callable[[], None]) -> None:
        for kept_fd in keep:
            os.set_inheritable(kept_fd, True)
        os.execv(args[0], args)

    process = companion.start(execute, keep=keep, log=log)
    try:
        pidfd = syscalls.pidfd_open(process["pid"])
    except ProcessLookupError:
        raise OSError(_last_line(log)) from None
    try:
        readable = companion.wait_readable([ready_fd, pidfd], _HELPER_TIMEOUT)
    finally:
        os.close(pidfd)
    if ready_fd in readable:
        return process
    companion.end(process)
    raise OSError(_last_line(log) if readable else f"not ready within {_HELPER_TIMEOUT:g} s")


def _last_line(log: str) -> str:
    lines = [line for line in _read(log).splitlines() if line.strip() and "syslog" not in line]
    return lines[-1].strip() if lines else "it ended without a word"


def _address_of(netns_pid: int) -> str | None:
    """Return the first IPv4 address of the namespace that is not a loopback one."""
    line_before = ""
    for line in _read(f"/proc/{netns_pid}/net/fib_trie").splitlines():
        if line.strip() == "/32 host LOCAL":
            address = line_before.strip("|- ")
            if not address.startswith("127."):
                return address
        line_before = line
    return None


# --- names


def resolv_conf(mode: str) -> bytes:
    """Return the /etc/resolv.conf of a container: the host's, with name servers that the container can reach.

    systemd-resolved's stub is replaced by the servers behind it. In a network of its own a container cannot
    reach the host's loopback: such servers are dropped, and where none is left DNS_FORWARDER takes their
    place.
    """
    if mode == "host":
        return _read(RESOLV_CONF).encode()
    servers, text = _host_nameservers()
    if not servers:
        return text.encode()
    reachable = [server for server in servers if not _is_local(server)]
    if not reachable and mode == "private":
        reachable = [DNS_FORWARDER]
    rest = [line for line in text.splitlines() if not line.startswith(("nameserver", "#", ";"))]
    lines = [*(f"nameserver {server}" for server in reachable), *rest]
    return "".join(f"{line}\n" for line in lines).encode()


def _host_nameservers() -> tuple[list[str], str]:
    """Return the host's name servers and the text that names them; for systemd-resolved's stub, its own."""
    text = _read(RESOLV_CONF)
    servers = _nameservers(text)
    if servers and all(server == _RESOLVED_STUB for server in servers):
        upstream = _read(RESOLVED_UPSTREAM)
        if _nameservers(upstream):
            return _nameservers(upstream), upstream
    return servers, text


def _nameservers(text: str) -> list[str]:
    lines = (line.split() for line in text.splitlines())
    return [words[1] for words in lines if words[:1] == ["nameserver"] and len(words) > 1]


def _is_local(server: str) -> bool:
    """Return whether only the host reaches this server: loopback, or an address of one link."""
    return server.startswith(("127.", "fe80:", "::ffff:127.")) or server in ("::1", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


# --- text


def _read(path: str) -> str:
    """Return the text of a file of the system, empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return ""


def _dotted(address: bytes) -> str:
    return ".".join(str(byte) for byte in address)


def _packed(address: str) -> bytes:
    return bytes(int(word) for word in address.split("."))
