"""A container's life: create, start, attach, stop, remove; and what is known of all of them.

Everything lies in `paths.containers_dir()/ID`: the bundle, the written layer, the log and `state.json`.
Every change of state happens under the container's lock, and whoever looks first clears away what a
killed owner left.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlenv import paths
from mlenv.container import attaching, logfile, record, removal, snapshot, state
from mlenv.container import bundle as bundles
from mlenv.container.launching import core_command, spawn_shim
from mlenv.container.snapshot import Container, Status
from mlenv.errors import (
    ContainerError,
    ContainerStartError,
    NameInUseError,
    NoSuchContainerError,
    PortInUseError,
)

if TYPE_CHECKING:
    import _socket
    from collections.abc import Iterator, Mapping

__all__ = [
    "Container",
    "Status",
    "attach",
    "containers",
    "create",
    "find",
    "kill",
    "logs",
    "remove",
    "start",
    "stop",
    "wait",
]

_SIGTERM, _SIGKILL = 15, 9
_KILL_DEADLINE = 10.0
"""Seconds that the kernel gets to end what has been killed."""
_LOG_PAUSE = 0.1
"""Seconds between two looks at a log that is followed."""
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


# --- beginning


def create(
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    container_id: str | None = None,
    remove_on_exit: bool = False,
) -> Container:
    """Make a container of an OCI configuration; nothing runs yet.

    Raises: NameInUseError; ContainerError for a configuration that cannot be carried out.
    """
    faults = bundles.check(dict(config))
    if faults:
        raise ContainerError("the container's configuration cannot be carried out", cause="\n".join(faults))
    container_id = container_id or os.urandom(32).hex()
    name = _checked_name(name) if name else f"{container_id[:12]}"
    root = paths.containers_dir()
    paths.private_dir(root.resolve())  # nobody else reaches a setuid file that a container has written
    with _locked(root):
        _refuse_taken(root, name)
        directory = root / container_id
        draft = root / f"{container_id}.{os.getpid()}.gone"  # what is not finished is swept like a removal
        draft.mkdir(mode=0o700)
        try:
            annotations = {**config.get("annotations", {}), bundles.NAME: name}
            complete = {"hostname": container_id[:12], **config, "annotations": annotations}
            _fill(draft, complete, container_id, name, remove_on_exit=remove_on_exit)
            draft.rename(directory)
        except BaseException:
            removal.remove_tree(str(draft))
            raise
    return snapshot.load(directory)


def _checked_name(name: str) -> str:
    if not _NAME_CHARACTERS.issuperset(name) or name[0] in "-.":
        raise ContainerError(
            f"`{name}` is no name for a container",
            hint="use letters, digits and _ . -, beginning with no . or -",
        )
    return name


def _refuse_taken(root: Path, name: str) -> None:
    for directory in _directories(root):
        try:
            taken = state.read(str(directory)).get("name") == name
        except (FileNotFoundError, ValueError):  # removed meanwhile; damaged
            continue
        if taken:
            raise NameInUseError(
                f"a container with the name `{name}` exists",
                hint=f"`mlenv rm {name}`, or choose another name",
            )


def _fill(
    directory: Path, config: dict[str, Any], container_id: str, name: str, *, remove_on_exit: bool
) -> None:
    record.write(str(directory / "config.json"), config, durable=True)
    (directory / "rootfs").mkdir()
    known = {
        "id": container_id,
        "name": name,
        "status": Status.CREATED.value,
        "created": time.time(),
        "remove_on_exit": remove_on_exit,
    }
    state.write(str(directory), known)


def start(container: Container, *, interactive: bool = False, attached: bool = False) -> None:
    """Start a container that does not run; return when its program has been executed.

    `interactive` keeps its stdin open; `attached` makes `attach` on the same object miss nothing: the
    container waits for a reader that is slow. Raises: ContainerStartError with 125, 126 or 127;
    PortInUseError.
    """
    directory = str(container.bundle)
    with _locked(container.bundle):
        known = _swept(directory)
        if Status(known["status"]).is_running:
            raise ContainerError(f"the container `{container.name}` is running already")
        answer, channel = spawn_shim(directory, container.id, interactive=interactive, attached=attached)
    if not answer.get("ok"):
        if channel is not None:
            channel.close()
        raise _start_error(answer, container)
    container.channel = channel
    _refresh(container)


def _start_error(answer: Mapping[str, Any], container: Container) -> ContainerError:
    fields = {"cause": answer.get("cause"), "hint": answer.get("hint")}
    if answer.get("code") == PortInUseError.code:
        return PortInUseError(answer["message"], **fields)
    message = f"the container `{container.name}` cannot be started: {answer['message']}"
    return ContainerStartError(message, **fields, status=answer.get("status", 125))


# --- looking


def containers(*, all: bool = True) -> list[Container]:  # noqa: A002 - `ps --all`
    """Return the containers, newest first; what killed owners left is cleared away before."""
    root = paths.containers_dir()
    found = []
    for directory in _directories(root):
        try:
            _swept_under_lock(directory)
            found.append(snapshot.load(directory))
        except FileNotFoundError:  # it has been removed meanwhile
            continue
        except ValueError as error:
            found.append(snapshot.damaged(directory, str(error)))
    _sweep_foreground()
    wanted = [container for container in found if all or container.status.is_running]
    return sorted(wanted, key=lambda container: container.created, reverse=True)


def find(reference: str) -> Container:
    """Return the container with this name, id or beginning of an id.

    Raises: NoSuchContainerError; ContainerError for a beginning that several have.
    """
    known = containers()
    for container in known:
        if reference in (container.name, container.id):
            return container
    matching = [container for container in known if reference and container.id.startswith(reference)]
    if len(matching) > 1:
        raise ContainerError(
            f"{len(matching)} containers begin with `{reference}`", hint="give more of the id"
        )
    if not matching:
        raise NoSuchContainerError(f"there is no container `{reference}`", hint="`mlenv ps -a` lists them")
    return matching[0]


def _directories(root: Path) -> list[Path]:
    """Return the containers' directories; unfinished and half-removed ones are deleted on the way."""
    if not root.is_dir():
        return []
    found = []
    for entry in os.scandir(root):
        if entry.name.endswith(".gone"):
            _delete_if_abandoned(entry.path)
        elif os.path.exists(os.path.join(entry.path, state.STATE_FILE)):
            found.append(Path(entry.path))
    return found


def _delete_if_abandoned(path: str) -> None:
    pid = path.rsplit(".", 2)[1]
    if not pid.isdigit() or state.start_time(int(pid)) is None:
        _delete(path)


def _refresh(container: Container) -> None:
    """Bring a container's fields up to date; one that is gone counts as stopped."""
    try:
        fresh = snapshot.load(container.bundle)
    except FileNotFoundError:
        container.status, container.pid = Status.STOPPED, None
        return
    for name in ("status", "pid", "exit_code", "started", "finished", "ports", "oom_killed", "warnings"):
        setattr(container, name, getattr(fresh, name))


# --- sweeping


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock_fd = state.lock(str(directory))
    try:
        yield
    finally:
        if lock_fd is not None:
            os.close(lock_fd)


def _swept_under_lock(directory: Path) -> None:
    """Clear a container whose shim has died, unless someone is changing it right now."""
    if not _is_orphaned(state.read(str(directory))):
        return
    lock_fd = state.lock(str(directory), wait=False)
    if lock_fd is None:
        return
    try:
        _swept(str(directory))
    finally:
        os.close(lock_fd)


def _is_orphaned(known: Mapping[str, Any]) -> bool:
    owner = known.get("shim")
    return bool(owner) and not state.is_alive(owner)


def _swept(directory: str) -> dict[str, Any]:
    """Return a container's state, after undoing what a dead shim left; the lock is held."""
    known = state.read(directory)
    if not _is_orphaned(known):
        return known
    rebooted = known["shim"]["boot_id"] != state.boot_id()
    if not rebooted:
        from mlenv.container import surroundings

        surroundings.undo(known)
        _unlink(known.get("socket"))
    if known["status"] == Status.RUNNING.value:
        known |= {
            "status": Status.STOPPED.value,
            "exit_code": None if rebooted else 137,
            "finished": time.time(),
        }
        known["warnings"] = ["the machine was restarted" if rebooted else "the container's shim was killed"]
    known |= {"shim": None, "init": None, "socket": None}
    state.write(directory, known)
    if known.get("remove_on_exit"):
        _delete(directory)
    return known


def _unlink(path: str | None) -> None:
    if path:
        Path(path).unlink(missing_ok=True)


def _sweep_foreground() -> None:
    """Undo what killed containers without a shim left."""
    root = paths.run_dir()
    if (root / "foreground").is_dir():
        from mlenv.container import foreground

        foreground.sweep_all(str(root))


# --- while it runs


def attach(container: Container, *, stdin: bool = True) -> int:
    """Connect our standard streams to the container's and return its exit status; 0 after Ctrl-P Ctrl-Q.

    Without a terminal our signals are passed on. Raises: ContainerError where it does not run.
    """
    connection = container.channel or _connect(container)
    container.channel = None
    status = attaching.Session(connection, stdin=stdin).run()
    _refresh(container)
    return 0 if status is None else status


def _connect(container: Container) -> _socket.socket:
    known = _known(container)
    path = known.get("socket")
    if known["status"] == Status.RUNNING.value and path:
        try:
            return attaching.connect(path)
        except OSError as error:
            raise ContainerError(
                f"the container `{container.name}` does not answer", cause=str(error)
            ) from error
    raise ContainerError(
        f"the container `{container.name}` is not running",
        hint=f"mlenv start {container.name}",
        code="not-running",
    )


def _known(container: Container) -> dict[str, Any]:
    try:
        return state.read(str(container.bundle))
    except FileNotFoundError:
        raise NoSuchContainerError(f"there is no container `{container.name}` any more") from None


def wait(container: Container) -> int:
    """Return the container's exit status once it has ended."""
    try:
        status = attaching.Session(_connect(container), stdin=False, output=False).run()
    except ContainerError:  # no shim, or one that ended before it took our connection
        _settle(container)
        _refresh(container)
        return 125 if container.exit_code is None else container.exit_code
    _refresh(container)
    return 125 if status is None else status


def _settle(container: Container) -> None:
    """Wait until a container whose shim is finishing has its state written."""
    known = _known(container)
    shim = known.get("shim")
    if shim:
        _await_end(shim, _KILL_DEADLINE)
    if container.bundle.exists():
        _swept_under_lock(container.bundle)


def kill(container: Container, signal: int) -> None:
    """Send a signal to the container's process.

    Raises: ContainerError where it does not run.
    """
    known = _known(container)
    if not state.kill_exactly(known.get("init"), signal):
        raise ContainerError(f"the container `{container.name}` is not running", code="not-running")


def stop(container: Container, *, timeout: float = 10.0) -> None:
    """End the container: its stop signal, then SIGKILL to everything in it after `timeout` seconds.

    One that does not run is left as it is. Raises: ContainerError if the kernel cannot end it.
    """
    try:
        known = _known(container)
    except NoSuchContainerError:
        return
    shim, init = known.get("shim"), known.get("init")
    if known["status"] == Status.RUNNING.value and state.is_alive(shim):
        signal = int(container.config.get("annotations", {}).get(bundles.STOP_SIGNAL, _SIGTERM))
        state.kill_exactly(init, signal)
        if not _await_end(shim, timeout):
            state.group_of(known).kill()
            state.kill_exactly(init, _SIGKILL)
            if not _await_end(shim, _KILL_DEADLINE):
                raise ContainerError(
                    f"the container `{container.name}` does not end",
                    cause="a process of it waits inside the kernel, often for a lost network disk",
                )
    if container.bundle.exists():
        _swept_under_lock(container.bundle)
    _refresh(container)


def _await_end(known: Mapping[str, Any] | None, timeout: float) -> bool:
    """Whether the process of this identity ends within `timeout` seconds."""
    import select

    from mlenv.container import syscalls

    if not known or not state.is_alive(dict(known)):
        return True
    try:
        pidfd = syscalls.pidfd_open(known["pid"])
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000)) or not state.is_alive(dict(known))
    finally:
        os.close(pidfd)


# --- end


def remove(container: Container, *, force: bool = False) -> None:
    """Delete a container with all it has written; `force` ends it first.

    Raises: ContainerError for one that runs.
    """
    if container.channel is not None:
        container.channel.close()
        container.channel = None
    if not container.bundle.exists():
        return
    if container.status.is_damaged:
        _remove_damaged(container, force=force)
        return
    if force:
        stop(container, timeout=0)
    if not container.bundle.exists():
        return
    with _locked(container.bundle):
        if Status(_swept(str(container.bundle))["status"]).is_running:
            raise ContainerError(
                f"the container `{container.name}` is running",
                hint=f"`mlenv stop {container.name}`, or `rm -f`",
            )
        _delete(str(container.bundle))
    if os.path.isdir(paths.kernel_dir(container.id)):
        _delete(str(paths.kernel_dir(container.id)))


def _remove_damaged(container: Container, *, force: bool) -> None:
    if not force:
        raise ContainerError(
            f"the state of the container `{container.name}` is damaged",
            cause="; ".join(container.warnings),
            hint=f"`mlenv rm -f {container.name}` deletes it with all it has written",
            code="damaged",
        )
    _delete(str(container.bundle))


def _delete(directory: str) -> None:
    """Delete a directory, as the container's root where we may not."""
    if os.geteuid() == 0:
        removal.remove(directory)
        return
    pid = os.posix_spawn(sys.executable, [*core_command("delete"), directory], os.environ)
    _, status = os.waitpid(pid, 0)
    if status:
        raise ContainerError(f"cannot delete `{directory}`", cause="its files belong to subordinate users")


def logs(
    container: Container, *, follow: bool = False, tail: int | None = None, since: float | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield ("stdout" or "stderr", bytes) of what the container wrote, oldest first.

    `tail` counts the last lines of text, `since` is seconds of the epoch; `follow` goes on until it ends.
    """
    directory = str(container.bundle)
    lines = logfile.Lines(directory)
    try:
        entries = [entry for entry in lines.read_all() if since is None or entry[0] >= since]
        yield from logfile.last_lines(entries, tail)
        while follow and lines.wait(lambda: _is_over(directory)):
            for _, stream, data in lines.read_more():
                yield stream, data
    finally:
        lines.close()


def _is_over(directory: str) -> bool:
    """Whether the container has ended, after a short wait."""
    try:
        shim = state.read(directory).get("shim")
    except FileNotFoundError:
        return True
    return not shim or _await_end(shim, _LOG_PAUSE)
