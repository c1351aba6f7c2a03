"""A container in the foreground, without a shim: it inherits our streams, and we end with its status.

While it runs its state lies below the root directory, so that whoever comes next can clean up after a
SIGKILL.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import errno
import os

from mlenv.container import bundle as bundles
from mlenv.container import process, removal, state, surroundings
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mlenv.container.bundle import Bundle

FOREGROUND = "foreground"
"""Directory below the root that holds the states of containers without a shim."""
_GONE = ".gone"
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
    refused = container_id.startswith(".") or container_id.endswith(_GONE)
    if not container_id or refused or not _ID_CHARACTERS.issuperset(container_id):
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
    """Return the container's new directory, locked; it has its name only with the lock already held."""
    parent = os.path.join(root, FOREGROUND)
    os.makedirs(parent, 0o700, exist_ok=True)
    if os.stat(parent).st_uid != os.geteuid():
        raise ContainerError(f"`{parent}` belongs to someone else", hint="give --root a directory of yours")
    directory = os.path.join(parent, container_id)
    sweep(directory)  # the same id may be left by one that was killed
    draft = _doomed(directory)
    os.mkdir(draft, 0o700)
    try:
        state.lock(draft)
        os.rename(draft, directory)
    except OSError as error:
        _delete(draft)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ContainerError(
                f"a container `{container_id}` is running", hint="give another id"
            ) from error
        raise
    except BaseException:
        _delete(draft)
        raise
    return directory


def _doomed(directory: str) -> str:
    """Return the name of what is not made yet, or not deleted yet, by this process."""
    return f"{directory}.{os.getpid()}{_GONE}"


def _release(directory: str) -> None:
    doomed = _doomed(directory)
    os.rename(directory, doomed)
    _delete(doomed)


def _delete(directory: str) -> None:
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    os.rmdir(directory)


def sweep_all(root: str) -> None:
    """Undo what killed containers below `root` left."""
    try:
        names = os.listdir(os.path.join(root, FOREGROUND))
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(root, FOREGROUND, name)
        if not name.endswith(_GONE):
            sweep(path)
        elif state.start_time(int(name.rsplit(".", 2)[1])) is None:
            removal.remove(path)


def sweep(directory: str) -> None:
    """Undo what the container of this directory left, unless it runs or somebody else does so already."""
    try:
        lock_fd = state.lock(directory, wait=False)
    except FileNotFoundError:
        return
    if lock_fd is None:
        return
    try:
        if not _is_at(lock_fd, os.path.join(directory, "lock")):  # it ended, and another has its name now
            return
        if os.path.exists(os.path.join(directory, state.STATE_FILE)):
            surroundings.undo(state.read(directory))
        removal.remove(directory)
    finally:
        os.close(lock_fd)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
