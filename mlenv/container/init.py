"""PID 1 where the static init was not built: the same work by the interpreter that is already there.

Nothing is imported once the container's root is entered. The program is executed by the host's interpreter,
which an image can then find through /proc/self/exe: the user is warned (`process.UNSEALED`).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_FROM_KERNEL = 0x80
"""si_code of a signal from the terminal, which the foreground group has got already. Source: sigaction(2)."""
_TERMINAL_STOPS = (_signal.SIGTTIN, _signal.SIGTTOU)


def run(
    program: str,
    arguments: list[str],
    environment: dict[str, str],
    *,
    channel_fd: int,
    fail: Callable[[OSError], None],
) -> NoReturn:
    """Start the program, pass signals on, reap orphans, and end with the program's status.

    `channel_fd` closes when the program is executed; `fail` reports that it cannot be.
    """
    signals = _signal.valid_signals() - {_signal.SIGKILL, _signal.SIGSTOP}
    _signal.pthread_sigmask(_signal.SIG_SETMASK, signals)
    child = os.fork()
    if child == 0:
        _execute(program, arguments, environment, fail)
    os.close(channel_fd)
    while True:
        received = _signal.sigwaitinfo(signals)
        if received.si_signo == _signal.SIGCHLD:
            status = _reap(child)
            if status is not None:
                os._exit(status)
        elif received.si_signo not in _TERMINAL_STOPS and received.si_code != _FROM_KERNEL:
            _pass_on(child, received.si_signo)


def _execute(
    program: str, arguments: list[str], environment: dict[str, str], fail: Callable[[OSError], None]
) -> NoReturn:
    os.setpgid(0, 0)
    if os.isatty(0):
        _signal.signal(_signal.SIGTTOU, _signal.SIG_IGN)
        os.tcsetpgrp(0, os.getpid())
        _signal.signal(_signal.SIGTTOU, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    try:
        os.execve(program, arguments, environment)
    except OSError as error:
        fail(error)
    os._exit(126)


def _reap(child: int) -> int | None:
    """Reap every process that has ended; return the status of `child` if it is among them."""
    status = None
    while True:
        try:
            ended, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if ended == 0:
            return status
        if ended == child:
            signalled = os.WIFSIGNALED(wait_status)
            status = 128 + os.WTERMSIG(wait_status) if signalled else os.WEXITSTATUS(wait_status)


def _pass_on(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return
