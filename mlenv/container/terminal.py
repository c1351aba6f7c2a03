"""Our own terminal between a person and a pty: raw mode, window size, and everything put back at the end."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import fcntl
import os
import select
import sys
import termios

from mlenv.container import frames, process, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CHUNK = 32768
_INPUT, _OUTPUT, _CONTROL, _LOCAL, _CHARACTERS = 0, 1, 2, 3, 6


def make_raw(descriptor: int) -> list[Any]:
    """Put the terminal into raw mode and return its attributes from before. Source: cfmakeraw(3)."""
    before = termios.tcgetattr(descriptor)
    raw = [*before[:_CHARACTERS], list(before[_CHARACTERS])]
    raw[_INPUT] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    raw[_OUTPUT] &= ~termios.OPOST
    raw[_CONTROL] = raw[_CONTROL] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[_LOCAL] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    raw[_CHARACTERS][termios.VMIN], raw[_CHARACTERS][termios.VTIME] = 1, 0
    termios.tcsetattr(descriptor, termios.TCSANOW, raw)
    return before


def restore(descriptor: int, attributes: list[Any]) -> None:
    """Give the terminal its attributes back."""
    termios.tcsetattr(descriptor, termios.TCSADRAIN, attributes)


def window_size(descriptor: int) -> tuple[int, int]:
    """Return (rows, columns) of a terminal."""
    size = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))
    return int.from_bytes(size[:2], sys.byteorder), int.from_bytes(size[2:4], sys.byteorder)


def set_window_size(descriptor: int, rows: int, columns: int) -> None:
    """Tell a pty how large its window is."""
    size = rows.to_bytes(2, sys.byteorder) + columns.to_bytes(2, sys.byteorder) + bytes(4)
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, size)


def proxy(master_fd: int, pid: int) -> int:
    """Copy between our standard streams and a pty until the process `pid`, our child, ends.

    Return its status.
    """
    ours = os.isatty(0)
    before = make_raw(0) if ours else None
    pidfd = syscalls.pidfd_open(pid)

    def resize(_number: int, _frame: object) -> None:
        set_window_size(master_fd, *window_size(0))

    try:
        if ours:
            resize(0, None)
            _signal.signal(_signal.SIGWINCH, resize)
        _copy(master_fd, pidfd)
        _, status = os.waitpid(pid, 0)
        _rest(master_fd)
        return process.exit_status(status)
    finally:
        if before is not None:
            restore(0, before)
        os.close(pidfd)


def _copy(master_fd: int, pidfd: int) -> None:
    poll = select.poll()
    for descriptor in (0, master_fd, pidfd):
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == pidfd:
                return
            target = 1 if descriptor == master_fd else master_fd
            if not _copy_once(descriptor, target):
                poll.unregister(descriptor)


def _copy_once(source_fd: int, target_fd: int) -> bool:
    try:
        data = os.read(source_fd, _CHUNK)
    except OSError:  # EIO: the pty's other side is closed
        return False
    if data:
        frames.write_all(target_fd, data)
    return bool(data)


def _rest(master_fd: int) -> None:
    """Copy what the process wrote before it ended."""
    os.set_blocking(master_fd, False)
    while True:
        try:
            data = os.read(master_fd, _CHUNK)
        except OSError:
            return
        if not data:
            return
        frames.write_all(1, data)
