"""The resolv.conf and hosts files of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlenv.container import net


@pytest.fixture
def resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's two files of name servers, both empty."""
    monkeypatch.setattr(net, "RESOLV_CONF", str(tmp_path / "resolv.conf"))
    monkeypatch.setattr(net, "RESOLVED_UPSTREAM", str(tmp_path / "upstream.conf"))
    return tmp_path


def test_servers_of_the_network_stay(resolver: Path) -> None:
    (resolver / "resolv.conf").write_text(
        "# by hand\nnameserver 192.0.2.53\nsearch example.org\noptions ndots:2\n"
    )
    assert net.resolv_conf("private") == b"nameserver 192.0.2.53\nsearch example.org\noptions ndots:2\n"


def test_the_hosts_network_has_the_hosts_file(resolver: Path) -> None:
    (resolver / "resolv.conf").write_text("# by hand\nnameserver 127.0.0.53\n")
    assert net.resolv_conf("host") == b"# by hand\nnameserver 127.0.0.53\n"


def test_resolveds_stub_is_replaced_by_what_is_behind_it(resolver: Path) -> None:
    (resolver / "resolv.conf").write_text("nameserver 127.0.0.53\noptions edns0\nsearch lan\n")
    (resolver / "upstream.conf").write_text("nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch lan\n")
    assert net.resolv_conf("private") == b"nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch lan\n"


@pytest.mark.parametrize("server", ["127.0.0.1", "127.0.0.53", "::1", "fe80::1%eth0", "0.0.0.0"])  # noqa: S104
def test_a_server_that_only_the_host_reaches_is_replaced(resolver: Path, server: str) -> None:
    (resolver / "resolv.conf").write_text(f"nameserver {server}\n")
    assert net.resolv_conf("private") == f"nameserver {net.DNS_FORWARDER}\n".encode()


def test_of_several_the_reachable_ones_stay(resolver: Path) -> None:
    (resolver / "resolv.conf").write_text("nameserver 127.0.0.1\nnameserver 192.0.2.53\n")
    assert net.resolv_conf("private") == b"nameserver 192.0.2.53\n"


def test_a_host_without_the_file(resolver: Path) -> None:
    assert net.resolv_conf("private") == b""
