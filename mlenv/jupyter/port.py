"""Whether a TCP port of 127.0.0.1 is free, and who holds it.

Source: proc_net_tcp(5): `local_address` is the address as a little-endian word and the port, both in
hexadecimal; state 0A is LISTEN.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

_LISTEN = "0A"
_STATE, _INODE = 3, 9


def is_free(port: int) -> bool:
    """Return whether a server could bind the port now, as Jupyter binds it (with SO_REUSEADDR)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)  # bound-not-listening sockets of others show only here
        except OSError:
            return False
    return True


def holder(port: int) -> str | None:
    """Return who listens on the port as `name (pid N)`, or None where that cannot be read."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's process, or one that has just ended
            for entry in (process / "fd").iterdir():
                if str(entry.readlink()) in sockets:
                    name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                    return f"{name} (pid {process.name})"
    return None


def _listening(port: int) -> set[str]:
    """Return the inodes of the sockets that listen on a port of any address."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text(encoding="ascii").splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[_STATE] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[_INODE])
    return inodes
