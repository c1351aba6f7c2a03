"""Processes that live beside a container on the host: pasta or slirp4netns, port forwarder, DNS relay.

Each is a child of the container's shim, holds none of its descriptors, and dies with it. A process is known
as `state.identity` has it, so a sweep after the shim's death, or a reboot, never ends a stranger that has
the same pid.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import os
import select
import time

from mlenv.container import state, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Identity = dict[str, Any]

END_TIMEOUT = 2.0
"""Seconds between asking a companion to end and killing it."""

def start(work: Callable[[Callable[[], None]], None], *, keep: Iterable[int] = (), log: str) -> Identity:
    """Fork a companion that does `work`, and return once it is ready or has replaced itself by a program.

    `work` is called in the child with a function that says it is ready; a program says so by being
    executed. The child has the descriptors in `keep`, its stderr is appended to the file `log`, and nothing
    else of ours is open in it. The caller must be single-threaded.

    Raises: OSError with the child's own words where it failed before it was ready.
    """
    parent = os.getpid()
    ready_fd, failure_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(parent, work, failure_fd, keep, log)
    os.close(failure_fd)
    with open(ready_fd, "rb") as pipe:
        failure = pipe.read().decode(errors="replace")
    if failure:
        os.waitpid(pid, 0)
        raise OSError(failure)
    return state.identity(pid) or {"pid": pid, "start_time": 0, "boot_id": ""}  # it has ended already


def _child(
    parent: int, work: Callable[[Callable[[], None]], None], failure_fd: int, keep: Iterable[int], log: str
) -> None:
    """Run `work` and end; what goes wrong goes to the parent until `work` says it is ready."""
    try:
        _become_companion(parent, sorted({*keep, failure_fd}), log)
        work(lambda: os.close(failure_fd))
    except BaseException as error:  # noqa: BLE001 - nothing may return into the parent's code
        try:
            os.write(failure_fd, str(error).encode() or repr(error).encode())
        except OSError:  # the parent has its answer: the log gets the rest
            os.write(2, f"{error!r}\n".encode())
        os._exit(1)
    os._exit(0)


def _become_companion(parent: int, keep: list[int], log: str) -> None:
    for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGCHLD, _signal.SIGPIPE):
        _signal.signal(number, _signal.SIG_DFL)
    _signal.set_wakeup_fd(-1)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
    null_fd = os.open("/dev/null", os.O_RDWR)
    log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for number, source_fd in enumerate((null_fd, null_fd, log_fd)):
        os.dup2(source_fd, number)
    last = 2
    for kept_fd in keep:
        if kept_fd > last + 1:
            syscalls.close_range(last + 1, kept_fd - 1)
        last = kept_fd
    syscalls.close_range(last + 1)
    die_with(parent)


def die_with(parent: int) -> None:
    """Have the kernel kill us when our parent, `parent`, ends; again after joining a user namespace."""
    syscalls.set_parent_death_signal(_signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def end(process: Identity, *, timeout: float = END_TIMEOUT) -> None:
    """End a companion, kindly for `timeout` seconds, and reap it where it is a child of ours."""
    try:
        pidfd = syscalls.pidfd_open(process["pid"])
    except OSError:
        return
    try:
        if state.is_alive(process):
            _signal_until_gone(pidfd, timeout)
    finally:
        os.close(pidfd)
    try:  # noqa: SIM105 - contextlib costs 5 ms
        os.waitpid(process["pid"], os.WNOHANG)
    except ChildProcessError:
        pass  # somebody else's child, or reaped before


def _signal_until_gone(pidfd: int, timeout: float) -> None:
    for number in (_signal.SIGTERM, _signal.SIGKILL):
        try:
            syscalls.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return
        if wait_readable([pidfd], timeout):
            return


def wait_readable(fds: Iterable[int], timeout: float) -> list[int]:
    """Return those of `fds` that can be read, have ended or hung up, after at most `timeout` seconds."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return [fd for fd, _ in poller.poll(max(0, timeout) * 1000)]


def join_namespaces(pid: int, parent: int, *, rootless: bool) -> None:
    """Move this single-threaded process into the network namespace of `pid`; `rootless`, its user one too."""
    kinds = [("user", syscalls.CLONE_NEWUSER), ("net", syscalls.CLONE_NEWNET)][0 if rootless else 1 :]
    opened = [(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY), kind) for name, kind in kinds]
    for namespace_fd, kind in opened:
        syscalls.setns(namespace_fd, kind)
        os.close(namespace_fd)
    die_with(parent)


def run_program(path: str, *args: str) -> int:
    """Run a program to its end without input or output, and return its exit status."""
    silent = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawn(path, [path, *args], os.environ, file_actions=silent, setsigmask=[])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def deadline(seconds: float) -> Callable[[], float]:
    """Return a function that says how many of `seconds` are left."""
    until = time.monotonic() + seconds
    return lambda: max(0.0, until - time.monotonic())
