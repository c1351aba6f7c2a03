"""Start, find, join and stop the JupyterLab server: one for each `MLENV_HOME`.

`server.json` says who it is (pid, start time and boot, port, token, folder); a lock on its directory makes
starting and stopping one at a time. A server is *confirmed* once it answered the command that started it;
until then it dies with that command, however that dies (see `mlenv.jupyter.process`), and nobody else joins
it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlenv.container.state import boot_id, start_time
from mlenv.errors import JupyterError
from mlenv.jupyter import api
from mlenv.jupyter.api import RunningKernel, kernels, shutdown_kernels
from mlenv.jupyter.configuration import configure, directory, variables, write_private
from mlenv.jupyter.port import holder, is_free

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RunningKernel", "Server", "find", "kernels", "shutdown_kernels", "start_or_join", "stop"]

START_DEADLINE = 90.0
"""Seconds until a new server must answer; three are usual, a cold disk and a loaded machine need more."""

_STOP_DEADLINE = 15.0
_POLL_INTERVAL = 0.05
_PORTS_TRIED = 100
_LOG_TAIL = 12
_MAX_PORT = 65535


@dataclass(kw_only=True)
class Server:
    """A JupyterLab server on 127.0.0.1.

    `url` is what to open and holds the token; `root_dir` is the folder it shows; `started` says that this
    call started it; `taken_by` why it has not the port asked for (" by NAME (pid N)"), or is empty.
    """

    port: int
    token: str = field(repr=False)
    pid: int
    root_dir: Path
    started: bool = False
    taken_by: str = ""
    starting: Starting | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The address of JupyterLab with the token that opens it."""
        return f"http://127.0.0.1:{self.port}/lab?token={self.token}"

    @property
    def page(self) -> Path:
        """A private file that leads a browser to `url`: the arguments of a browser show in `ps`."""
        return directory() / "runtime" / f"jpserver-{self.pid}-open.html"

    def wait(self) -> None:
        """Return once the server answers, and confirm it; at once where it was running before.

        Raises: JupyterError with the end of the server's log, and no server left.
        """
        while self.starting is not None:
            if self.starting.answers():
                self.starting.confirm()
                self.starting = None
            elif self.starting.lost_port:
                self._move()

    def _move(self) -> None:
        """Start again on the next port: somebody took ours between our look and the server's bind."""
        if self.starting is None or self.starting.explicit_port:
            raise _port_taken(self.port)
        with _one_at_a_time():
            again = _start(self.root_dir, self.port, explicit_port=False)
        self.port, self.token, self.pid = again.port, again.token, again.pid
        self.taken_by, self.starting = again.taken_by, again.starting


def start_or_join(root_dir: Path, *, port: int = 8888, explicit_port: bool = False) -> Server:
    """Return the running server, or start one that shows `root_dir`; call `wait` on it before use.

    Where `port` is taken the next free one is used, unless the user named it (`explicit_port`).
    Raises: JupyterError where a named port is taken, or another command's server does not come up.
    """
    deadline = time.monotonic() + START_DEADLINE
    while True:
        with _one_at_a_time():
            state = _state()
            if state is None:
                _clear()
                return _start(root_dir.resolve(), port, explicit_port=explicit_port)
        if state["confirmed"]:
            return _server(state)
        if time.monotonic() > deadline:
            raise _not_started("another `mlenv up` has been starting it for too long")
        time.sleep(_POLL_INTERVAL)


def find() -> Server | None:
    """Return the server whose process runs, or None."""
    state = _state()
    return _server(state) if state else None


def stop() -> bool:
    """End the server and its kernels, and remove its files; return whether there was one."""
    with _one_at_a_time():
        state = _state()
        if state is not None:
            _end(state)
        _clear()
        return state is not None


@dataclass(kw_only=True)
class Starting:
    """A server process that has not been confirmed; closing `known_fd` without a byte ends it."""

    child: subprocess.Popen[bytes]
    known_fd: int
    state: dict[str, Any]
    explicit_port: bool
    deadline: float
    lost_port: bool = False

    def answers(self) -> bool:
        """Wait until the server answers; return False where it found its port taken.

        Raises: JupyterError where it ended or took too long; it is gone then.
        """
        try:
            while not api.answers(self.state["port"], self.state["token"]):
                if self.child.poll() is not None and not is_free(self.state["port"]):
                    self.lost_port = True
                    os.close(self.known_fd)
                    return False
                self._check()
                time.sleep(_POLL_INTERVAL)
        except BaseException:
            self.child.kill()
            self.child.wait()
            os.close(self.known_fd)
            raise
        return True

    def _check(self) -> None:
        if self.child.returncode is not None:
            raise _not_started(f"it ended with status {self.child.returncode}")
        if time.monotonic() > self.deadline:
            raise _not_started(f"it did not answer within {START_DEADLINE:.0f} seconds")

    def confirm(self) -> None:
        """Let the server live on without us."""
        write_private(directory() / "server.json", {**self.state, "confirmed": True})
        os.write(self.known_fd, b"1")
        os.close(self.known_fd)
        self.child.returncode = 0  # it outlives us: no warning that it was not waited for


def _start(root_dir: Path, port: int, *, explicit_port: bool) -> Server:
    """Start a server process and return it, unconfirmed."""
    chosen = _choose(port, explicit=explicit_port)
    taken_by = "" if chosen == port else f" by {holder(port) or 'another process'}"
    token = secrets.token_hex(24)
    configure(root_dir, chosen, token)
    child, known_fd = _spawn(root_dir)
    state = {
        "pid": child.pid,
        "start_time": start_time(child.pid),
        "boot_id": boot_id(),
        "port": chosen,
        "token": token,
        "root_dir": str(root_dir),
        "confirmed": False,
    }
    write_private(directory() / "server.json", state)
    server = _server(state)
    server.started, server.taken_by = True, taken_by
    server.starting = Starting(
        child=child,
        known_fd=known_fd,
        state=state,
        explicit_port=explicit_port,
        deadline=time.monotonic() + START_DEADLINE,
    )
    return server


def _spawn(root_dir: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Return the server's process, and the descriptor that keeps it alive until it is confirmed."""
    known_in, known_fd = os.pipe()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    log_fd = os.open(directory() / "server.log", flags, 0o600)  # Jupyter writes its URL there, with the token
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "mlenv.jupyter.process", str(known_in)],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            cwd=root_dir,
            env=variables(),
            pass_fds=(known_in,),
            start_new_session=True,
        )
    except BaseException:
        os.close(known_fd)
        raise
    finally:
        os.close(known_in)
        os.close(log_fd)
    return child, known_fd


def _choose(port: int, *, explicit: bool) -> int:
    """Return the port to serve on: `port`, or the first free one after it."""
    if explicit and not is_free(port):
        raise _port_taken(port)
    candidates = range(port, min(port + _PORTS_TRIED, _MAX_PORT + 1))
    for candidate in candidates:
        if is_free(candidate):
            return candidate
    raise JupyterError(
        f"no port from {candidates[0]} to {candidates[-1]} is free",
        hint="choose another with `--port`",
        code="port-in-use",
    )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold the lock under which servers start and stop; the kernel frees it when we die."""
    descriptor = os.open(directory(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _state() -> dict[str, Any] | None:
    """Return what `server.json` says, where the process it names still runs."""
    try:
        state: dict[str, Any] = json.loads((directory() / "server.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    same_boot = state["boot_id"] == boot_id()
    return state if same_boot and start_time(state["pid"]) == state["start_time"] else None


def _server(state: dict[str, Any]) -> Server:
    root_dir = Path(state["root_dir"])
    return Server(token=state["token"], port=state["port"], pid=state["pid"], root_dir=root_dir)


def _end(state: dict[str, Any]) -> None:
    """Ask the server to end, which ends its kernels first; insist where it does not."""
    pidfd = _open_process(state)
    if pidfd is None:
        return
    try:
        if not state["confirmed"]:  # no kernel can run yet: nobody has had the token
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with suppress(OSError, ValueError, HTTPException):  # one that cannot be asked is told by signal
            api.request(state["port"], state["token"], "POST", "/api/shutdown")
        for number in (signal.SIGTERM, signal.SIGKILL):
            if _ended(pidfd):
                return
            signal.pidfd_send_signal(pidfd, number)
        _ended(pidfd)
    finally:
        os.close(pidfd)


def _open_process(state: dict[str, Any]) -> int | None:
    """Return a descriptor of the server's process, made sure that it is still the same one."""
    try:
        pidfd = os.pidfd_open(state["pid"])
    except ProcessLookupError:
        return None
    if start_time(state["pid"]) == state["start_time"]:
        return pidfd
    os.close(pidfd)
    return None


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(_STOP_DEADLINE * 1000))


def _clear() -> None:
    """Remove what a server that no longer runs left."""
    for entry in directory().iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _port_taken(port: int) -> JupyterError:
    return JupyterError(
        f"port {port} is taken",
        cause=f"{holder(port) or 'another process'} listens on it",
        hint="choose another `--port`, or leave it out and the next free one is used",
        code="port-in-use",
    )


def _not_started(reason: str) -> JupyterError:
    return JupyterError(
        "the Jupyter server did not start",
        cause=f"{reason}; the last words of `{directory() / 'server.log'}`:\n{_log_tail()}",
        hint="mlenv down --all, then try again",
        code="jupyter-not-started",
    )


def _log_tail() -> str:
    try:
        lines = (directory() / "server.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return "(it wrote nothing)"
    return "\n".join(lines[-_LOG_TAIL:])
