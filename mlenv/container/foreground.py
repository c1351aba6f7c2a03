"""A container in the foreground, without a shim: it inherits our streams, and we end with its status.

While it runs its state lies below the root directory, so that whoever comes next can clean up after a
SIGKILL.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import os

from mlenv.container import bundle as bundles
from mlenv.container import process, state, surroundings
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mlenv.container.bundle import Bundle

FOREGROUND = "foreground"
"""Directory below the root that holds the states of containers without a shim."""
_FORWARDED = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGTERM,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGWINCH,
)
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-+")


def default_root() -> str:
    """Return where live state goes when no `--root` is given; the same as `paths.run_dir`."""
    moved = os.environ.get("MLENV_HOME")
    if moved:
        return os.path.join(os.path.abspath(moved), "run")
    if os.geteuid() == 0:
        return "/run/mlenv"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.access(runtime, os.W_OK | os.X_OK):
        return os.path.join(runtime, "mlenv")
    return f"/tmp/mlenv-{os.getuid()}/mlenv"  # noqa: S108 - made with mode 0700 below, refused if another's


def run(*, bundle: str, container_id: str, root: str | None = None) -> int:
    """Run the bundle's process to its end and return its exit status.

    Raises: ContainerError; ContainerStartError with 125, 126 or 127.
    """
    if not container_id or container_id.startswith(".") or not _ID_CHARACTERS.issuperset(container_id):
        raise ContainerError(f"`{container_id}` is no container id", hint="use letters, digits and _ . - +")
    loaded = bundles.read(bundle)
    process.hold_signals(_FORWARDED)
    if loaded.ports:
        raise ContainerError(
            "a container without a shim cannot publish ports", hint="start it with `mlenv run -d`"
        )
    directory = _claim(root or default_root(), container_id)
    try:
        return _run(loaded, container_id, directory)
    finally:
        _release(directory)


def _claim(root: str, container_id: str) -> str:
    directory = os.path.join(root, FOREGROUND, container_id)
    os.makedirs(directory, 0o700, exist_ok=True)
    if os.stat(directory).st_uid != os.geteuid():
        raise ContainerError(
            f"`{directory}` belongs to someone else", hint="give --root a directory of yours"
        )
    if state.lock(directory, wait=False) is None:
        raise ContainerError(f"a container `{container_id}` is running", hint="give another id")
    return directory


def _release(directory: str) -> None:
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    os.rmdir(directory)


def _run(bundle: Bundle, container_id: str, directory: str) -> int:
    known: dict[str, Any] = {"id": container_id, "bundle": bundle.path, "owner": state.identity(os.getpid())}
    try:
        started = surroundings.start(bundle, known, directory, note=lambda note: state.write(directory, note))
        process.pass_signals(_FORWARDED, started.pid)
        for problem in known["warnings"]:
            os.write(2, f"warning: {problem}\n".encode())
        if started.terminal_fd is not None:
            from mlenv.container import terminal

            return terminal.proxy(started.terminal_fd, started.pid)
        _, status = os.waitpid(started.pid, 0)
        return process.exit_status(status)
    finally:
        for held in surroundings.undo(known):
            os.write(2, f"warning: a control group stays behind: {held}\n".encode())
