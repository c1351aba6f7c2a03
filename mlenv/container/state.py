"""What is known of a container between commands: one `state.json` that is replaced in one step, under a lock.

A process is known by (pid, start time, boot id): a pid alone may belong to another one by now.
"""

from __future__ import annotations

import errno
import os

from mlenv.container import cgroups, record, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STATE_FILE = "state.json"
_RESERVE_FILE = "state.reserve"
_RESERVE_SIZE = 16384
"""Bytes; a state is a tenth of it."""
_LOCK_EXCLUSIVE, _LOCK_NOT_WAITING = 2, 4
_START_TIME_FIELD = 19
"""Index of starttime after the command's name. Source: proc_pid_stat(5), field 22."""


def boot_id() -> str:
    """Return the id of this boot of the machine."""
    with open("/proc/sys/kernel/random/boot_id", "rb", buffering=0) as file:
        return file.read().decode().strip()


def identity(pid: int) -> dict[str, Any] | None:
    """Return what tells the process `pid` from any other that ever had its number.

    None where there is none.
    """
    started = start_time(pid)
    return None if started is None else {"pid": pid, "start_time": started, "boot_id": boot_id()}


def start_time(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks since boot; None where it has ended (zombies included)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            content = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = content.rpartition(b") ")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[_START_TIME_FIELD])


def is_alive(known: dict[str, Any] | None) -> bool:
    """Whether the process of this identity still runs."""
    if not known:
        return False
    return bool(start_time(known["pid"]) == known["start_time"] and boot_id() == known["boot_id"])


def read(directory: str) -> dict[str, Any]:
    """Return a container's state. Raises: OSError; ValueError for a damaged file."""
    value = record.read(os.path.join(directory, STATE_FILE))
    if not isinstance(value, dict):
        raise ValueError(f"`{directory}/{STATE_FILE}` holds no object")  # noqa: TRY004 - a damaged file
    return value


def write(directory: str, value: dict[str, Any]) -> None:
    """Replace a container's state; on a full disk in the room that `reserve` has kept. Raises: OSError."""
    path = os.path.join(directory, STATE_FILE)
    try:
        record.write(path, value)
    except OSError as error:
        kept = os.path.join(directory, _RESERVE_FILE)
        if error.errno != errno.ENOSPC or not os.path.exists(kept):
            raise
        os.unlink(kept)
        record.write(path, value)


def reserve(directory: str) -> None:
    """Keep room for one more state, so that a container that has filled the disk can still be seen to end."""
    kept_fd = os.open(
        os.path.join(directory, _RESERVE_FILE), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )
    try:
        os.write(kept_fd, bytes(_RESERVE_SIZE))
    finally:
        os.close(kept_fd)


def lock(directory: str, *, wait: bool = True) -> int | None:
    """Return the container's lock, held until the descriptor is closed.

    None where it is taken and not waited for.

    The kernel drops it with its holder, so there is no stale lock.
    """
    while True:
        lock_fd = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            syscalls.flock(lock_fd, _LOCK_EXCLUSIVE | (0 if wait else _LOCK_NOT_WAITING))
        except OSError as error:
            os.close(lock_fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
                if not wait:
                    return None
                continue
            raise
        return lock_fd


def kill_exactly(known: dict[str, Any] | None, number: int) -> bool:
    """Send a signal to the process of this identity and to no other; False where it has ended."""
    if not known:
        return False
    try:
        pidfd = syscalls.pidfd_open(known["pid"])
    except ProcessLookupError:
        return False
    try:
        if not is_alive(known):
            return False
        syscalls.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def group_of(value: dict[str, Any]) -> cgroups.Group:
    """Return the control groups a state names."""
    named = value.get("cgroup") or {"version": 0, "directories": {}}
    return cgroups.Group(named["version"], named["directories"])
