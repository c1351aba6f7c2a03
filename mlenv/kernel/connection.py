"""The private directory of one kernel: its five Unix sockets and its connection file.

The directory is mounted into the container at the same path, so a name means the same on both sides. A kernel
gets a connection file of its own there, because old kernels rewrite theirs and cannot see the front end's.
Source: jupyter_client documentation, "Connection files"; zmq_ipc(7).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlenv import paths

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
"""The channels of a kernel, as the `*_port` keys of a connection file name them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """Where one kernel listens and how its messages are signed.

    `directory` is the same inside and outside. `first_port` numbers the sockets: `s-PORT` to `s-PORT+4`.
    `signing` holds the front end's other keys (`key`, `signature_scheme`, `curve_*`) as text. `held_fd` is
    the directory's descriptor, locked as long as the process lives that will remove it; -1 in any other.
    """

    directory: Path
    first_port: int
    signing: Mapping[str, str]
    held_fd: int = -1

    @property
    def file(self) -> Path:
        """The kernel's own connection file."""
        return self.directory / "connection.json"

    @property
    def ports(self) -> dict[str, int]:
        """The number of each channel's socket."""
        return {channel: self.first_port + place for place, channel in enumerate(CHANNELS)}

    def socket(self, channel: str) -> Path:
        """Return the path of a channel's socket, made as libzmq makes it from `ip` and port."""
        return self.directory / f"s-{self.ports[channel]}"

    @property
    def document(self) -> dict[str, Any]:
        """The connection file as JSON holds it."""
        ports = {f"{channel}_port": port for channel, port in self.ports.items()}
        return {**self.signing, "transport": "ipc", "ip": str(self.directory / "s"), **ports}

    @property
    def is_bound(self) -> bool:
        """Whether the kernel listens on all its sockets."""
        return all(self.socket(channel).exists() for channel in CHANNELS)

    def prepare(self) -> None:
        """Write the connection file anew and remove the sockets of a kernel that was here before.

        The container can write here too: no link that it may have put in a file's place is followed.
        """
        with suppress(FileExistsError):
            self.directory.mkdir(mode=0o700)
        directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for path in (self.file, *map(self.socket, CHANNELS)):
                with suppress(FileNotFoundError):
                    os.unlink(path.name, dir_fd=directory_fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file_fd = os.open(self.file.name, flags, 0o600, dir_fd=directory_fd)
        finally:
            os.close(directory_fd)
        with os.fdopen(file_fd, "w", encoding="utf-8") as file:
            json.dump(self.document, file)

    def remove(self) -> None:
        """Remove the directory with everything in it, if it is still there. To be called once."""
        _remove(self.directory)
        if self.held_fd >= 0:
            os.close(self.held_fd)


def new_connection(container_id: str, signing: Mapping[str, str]) -> Connection:
    """Make a directory for one kernel of a container and return its connection.

    What kernels left whose front end was killed is removed on the way.
    """
    parent = paths.private_dir(paths.kernel_dir(container_id))
    parent_fd = _locked(parent, wait=True)
    try:
        _sweep(parent)
        directory = parent / secrets.token_hex(4)
        directory.mkdir(mode=0o700)
        held_fd = _locked(directory, wait=True)
    finally:
        os.close(parent_fd)
    # Numbers differ between kernels, because jupyter_server tells by them that a restarted kernel moved.
    first_port = 1 + len(CHANNELS) * secrets.randbelow(1 << 13)
    return Connection(directory=directory, first_port=first_port, signing=dict(signing), held_fd=held_fd)


def _sweep(parent: Path) -> None:
    """Remove the directories that nobody holds any more, and whatever else a container put beside them."""
    for directory in parent.iterdir():
        try:
            free_fd = _locked(directory, wait=False)
        except (BlockingIOError, FileNotFoundError):
            continue
        except NotADirectoryError:
            directory.unlink(missing_ok=True)
            continue
        _remove(directory)
        os.close(free_fd)


def _locked(directory: Path, *, wait: bool) -> int:
    """Return the descriptor of a directory with a lock that ends when the descriptor is closed, or we die.

    Raises: BlockingIOError where another holds it and we do not wait; NotADirectoryError for a link too.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove(directory: Path) -> None:
    if directory.is_symlink() or directory.is_file():  # a container's doing: rmtree takes neither
        directory.unlink(missing_ok=True)
        return
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)
