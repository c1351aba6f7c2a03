"""Whether a port is free and who holds it."""

from __future__ import annotations

import os
import socket

from mlenv.jupyter import port


def test_port_with_a_listener_is_not_free_and_its_holder_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        assert not port.is_free(number)
        assert port.holder(number).endswith(f"(pid {os.getpid()})")
    assert port.is_free(number)


def test_listener_on_all_addresses_is_seen():
    with socket.create_server(("0.0.0.0", 0)) as listener:  # noqa: S104 - what the test is about
        assert not port.is_free(listener.getsockname()[1])


def test_nobody_holds_a_free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
    assert port.holder(number) is None
