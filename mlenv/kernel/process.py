"""A kernel's process in a running container, as the host sees it.

Three processes take part: ours, which holds the lifeline; the core's `exec` process, our child, which enters
the container and ends with the kernel's status; and the kernel, known by its host pid, which gets the signals
directly.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from mlenv.container import launching, lifecycle
from mlenv.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import PurePosixPath

    from mlenv.kernel.connection import Connection
    from mlenv.kernel.variables import Variables

START_DEADLINE = 60.0
"""Seconds a kernel has to listen on its sockets: a cold disk and a loaded machine need many."""

_POLL_INTERVAL = 0.005
_TAIL = 4096
_SIGNALLED = 128
_CONTAINER_MISSES_PROGRAM = (126, 127)


def running_container(environment: str) -> lifecycle.Container:
    """Return the running container of an environment.

    Raises: KernelError where there is none.
    """
    for container in lifecycle.containers(all=False):
        if container.config.get("annotations", {}).get("dev.mlenv.environment") == environment:
            return container
    raise KernelError(
        f"environment `{environment}` is not running",
        cause="its kernels run in its container, and there is none",
        hint=f"mlenv up {environment}",
        code="environment-not-running",
    )


class KernelProcess:
    """A kernel that has been started: its host pid, its exit status, and the ways to end it."""

    def __init__(
        self, child: subprocess.Popen[bytes], host_pid: int, lifeline_fd: int, stderr: StderrTail
    ) -> None:
        self._child = child
        self._lifeline_fd = lifeline_fd
        self._stderr = stderr
        self.host_pid = host_pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal as `subprocess` has it, or None while it runs."""
        status = self._child.poll()
        return None if status is None else _as_subprocess_has_it(status)

    async def wait(self) -> int:
        """Return the exit status once the kernel has ended."""
        if self._child.poll() is None:
            pidfd = os.pidfd_open(self._child.pid)
            try:
                await _readable(pidfd)
            finally:
                os.close(pidfd)
        return _as_subprocess_has_it(self._child.wait())

    def send_signal(self, number: int) -> None:
        """Signal the kernel's process group, so that what a cell started is interrupted too."""
        if self._child.poll() is not None:
            return
        with suppress(ProcessLookupError):
            if os.getpgid(self.host_pid) == self.host_pid:
                os.killpg(self.host_pid, number)
            else:
                os.kill(self.host_pid, number)

    def close(self) -> None:
        """Let go of the lifeline, which kills the kernel if it still runs. May be called twice."""
        if self._lifeline_fd >= 0:
            os.close(self._lifeline_fd)
            self._lifeline_fd = -1

    def stderr_tail(self) -> str:
        """Return the last lines the kernel wrote to stderr; complete once it has ended."""
        return self._stderr.text()


def _as_subprocess_has_it(status: int) -> int:
    """Return a shell's 128+n for signal n as -n."""
    return _SIGNALLED - status if status > _SIGNALLED else status


class StderrTail:
    """Passes a kernel's stderr on and remembers its end, to be quoted when the kernel does not start."""

    def __init__(self, source: IO[bytes] | None) -> None:
        self._tail = bytearray()
        self._thread: threading.Thread | None = None
        if source is not None:
            self._thread = threading.Thread(
                target=self._copy, args=(source,), name="kernel-stderr", daemon=True
            )
            self._thread.start()

    def _copy(self, source: IO[bytes]) -> None:
        with source:
            while chunk := os.read(source.fileno(), 65536):
                self._tail += chunk
                del self._tail[:-_TAIL]
                with suppress(OSError):  # the front end may have closed its own stderr
                    os.write(2, chunk)

    def text(self) -> str:
        """Return what has come so far, after waiting shortly for the end of a process that has exited."""
        if self._thread is not None:
            self._thread.join(timeout=1.0)
        return self._tail.decode(errors="replace").strip()


async def start_kernel(
    container: lifecycle.Container,
    args: Sequence[str],
    *,
    connection: Connection,
    variables: Variables,
    cwd: PurePosixPath | None,
    stdio: Mapping[str, Any],
) -> KernelProcess:
    """Start `args` in the container and return once its sockets are bound.

    `stdio` may hold `stdin`, `stdout` and `stderr` as `subprocess.Popen` takes them. Waiting for the sockets
    makes the first reply faster: a client that connects too early tries again only after 100 ms
    (ZMQ_RECONNECT_IVL).
    Raises: KernelError, with the end of the kernel's stderr, and nothing left running.
    """
    connection.prepare()
    child, pid_fd, lifeline_fd = _spawn(container, args, variables=variables, cwd=cwd, stdio=stdio)
    stderr = StderrTail(child.stderr)
    kernel = KernelProcess(child, 0, lifeline_fd, stderr)
    try:
        await asyncio.wait_for(_until_bound(container, args, kernel, pid_fd, connection), START_DEADLINE)
    except asyncio.TimeoutError:
        await _give_up(kernel)
        raise _silent(container) from None
    except BaseException:
        await asyncio.shield(_give_up(kernel))
        raise
    return kernel


def _spawn(
    container: lifecycle.Container,
    args: Sequence[str],
    *,
    variables: Variables,
    cwd: PurePosixPath | None,
    stdio: Mapping[str, Any],
) -> tuple[subprocess.Popen[bytes], int, int]:
    """Return the core's exec process, the descriptor its pid comes from, and our end of the lifeline."""
    pid_fd, pid_out = os.pipe()
    lifeline_in, lifeline_fd = os.pipe()
    try:
        argv = launching.exec_command(
            container,
            args,
            env=variables.explicit,
            inherited=sorted(variables.inherited),
            cwd=str(cwd) if cwd else None,
            pid_fd=pid_out,
            lifeline_fd=lifeline_in,
        )
        child = subprocess.Popen(
            argv,
            stdin=stdio.get("stdin", subprocess.DEVNULL),
            stdout=stdio.get("stdout"),
            stderr=stdio.get("stderr", subprocess.PIPE),
            env={**os.environ, **variables.inherited},
            pass_fds=(pid_out, lifeline_in),
            start_new_session=True,
        )
    except BaseException:
        os.close(pid_fd)
        os.close(lifeline_fd)
        raise
    finally:
        os.close(pid_out)
        os.close(lifeline_in)
    return child, pid_fd, lifeline_fd


async def _read_pid(pid_fd: int) -> int:
    """Return the host pid the core reports, or 0 where it ended without one."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            await _readable(pid_fd)
            chunk = os.read(pid_fd, 32)
            if not chunk:
                return 0
            text += chunk
    finally:
        os.close(pid_fd)
    return int(text)


async def _readable(descriptor: int) -> None:
    """Wait until a descriptor can be read, or is at its end."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _until_bound(
    container: lifecycle.Container,
    args: Sequence[str],
    kernel: KernelProcess,
    pid_fd: int,
    connection: Connection,
) -> None:
    kernel.host_pid = await _read_pid(pid_fd)
    if not kernel.host_pid:
        raise _not_started(container, args, await kernel.wait(), kernel.stderr_tail())
    while not connection.is_bound:
        if kernel.poll() is not None:
            raise _ended_early(container, kernel)
        await asyncio.sleep(_POLL_INTERVAL)


async def _give_up(kernel: KernelProcess) -> None:
    """End a kernel that was being started, and what it had started itself."""
    if kernel.host_pid:
        kernel.send_signal(signal.SIGKILL)
    kernel.close()
    await kernel.wait()


def _silent(container: lifecycle.Container) -> KernelError:
    return KernelError(
        f"the kernel in container `{container.name}` does not answer",
        cause=f"it has not opened its sockets in {START_DEADLINE:.0f} seconds",
        hint=f"mlenv logs {container.name}",
        code="kernel-silent",
    )


def _not_started(
    container: lifecycle.Container, args: Sequence[str], status: int, stderr: str
) -> KernelError:
    missing = status in _CONTAINER_MISSES_PROGRAM
    return KernelError(
        f"the kernel of `{container.name}` could not be started",
        cause=stderr or f"`{args[0]}` ended with status {status} before it ran",
        hint=f"use an image that has `{args[0]}`" if missing else f"mlenv logs {container.name}",
        code="kernel-not-started",
    )


def _ended_early(container: lifecycle.Container, kernel: KernelProcess) -> KernelError:
    tail = kernel.stderr_tail()
    if "No module named ipykernel" in tail:
        hint = "add `ipykernel` to `packages:` of the spec, then run `mlenv up` again"
    else:
        hint = f"mlenv exec {container.name} python -m ipykernel_launcher --version"
    return KernelError(
        f"the kernel of `{container.name}` ended while it was starting",
        cause="\n".join(tail.splitlines()[-8:]) or f"it exited with status {kernel.poll()} and wrote nothing",
        hint=hint,
        code="kernel-died",
    )
