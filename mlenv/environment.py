"""The main flow: a spec becomes a lock, the lock an image, the image a container that runs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv import paths
from mlenv.errors import MlenvError, NoSuchContainerError
from mlenv.lock.file import matching_digest, matching_lock, write_lock
from mlenv.spec.reader import read_document, read_outline, read_spec
from mlenv.spec.sources import locate, lock_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import ExitStack

    from mlenv.container.config import Port
    from mlenv.container.lifecycle import Container
    from mlenv.image.build import Image
    from mlenv.lock.model import Lock
    from mlenv.progress import Progress
    from mlenv.spec.model import GpuSelection, Spec
    from mlenv.spec.reader import Outline


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A spec whose lock is pinned and whose image lies in the store."""

    spec: Spec
    lock: Lock
    image: Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """An environment that is up. `started`: this call started its container."""

    spec: Spec
    lock: Lock
    image: Image
    container: Container
    started: bool


def prepare(name: str, *, cwd: Path, mirror: str | None = None, progress: Progress) -> Prepared:
    """Turn what `name` means into a lock and an image, making only what is missing.

    `mirror`: Debian mirror to use instead of the host's own.
    """
    spec = read_spec(locate(name, cwd=cwd))
    lock = ensure_lock(spec.path, mirror=mirror, progress=progress)
    image = ensure_image(lock, spec_path=spec.path, mirror=mirror, progress=progress)
    return Prepared(spec=spec, lock=lock, image=image)


def start(
    prepared: Prepared,
    *,
    folders: Sequence[Path],
    publish: Sequence[Port] = (),
    gpus: GpuSelection | None = None,
    progress: Progress,
    undo: ExitStack,
) -> Environment:
    """Start the environment's container, or join the one that runs the same lock.

    `folders` are mounted at their own paths; `publish` comes before the spec's ports; `undo` receives what
    takes back everything this call started, for the caller to run when a later step fails.
    """
    from mlenv.launch import local

    spec, lock, image = prepared.spec, prepared.lock, prepared.image
    with _one_at_a_time(spec.name):
        container = find_running(spec.name)
        started = container is None
        if container is None:
            with progress.step(f"starting {spec.name}"):
                container = local.start_environment(
                    spec,
                    image,
                    lock,
                    folders=folders,
                    publish=publish,
                    gpus=gpus,
                    progress=progress,
                    undo=undo,
                )
        else:
            _same_environment(container, lock, folders, progress)
    return Environment(spec=spec, lock=lock, image=image, container=container, started=started)


def build(
    spec_path: Path, *, outline: Outline | None = None, mirror: str | None = None, progress: Progress
) -> Image:
    """Build the image of a spec and return it; an unchanged one costs reading the spec and the lock.

    `outline` is the spec's where the caller has read it.
    """
    built = _find_built(outline or read_outline(spec_path))
    if built is not None:
        return built
    lock = ensure_lock(spec_path, mirror=mirror, progress=progress)
    return ensure_image(lock, spec_path=spec_path, mirror=mirror, progress=progress)


def _find_built(outline: Outline) -> Image | None:
    """Return the image of a spec whose lock the store knows, without the models of locks and of packages."""
    from mlenv.image.build import find_built
    from mlenv.image.store import Store, explain_os_errors

    for place in _lock_places(lock_path(outline.path), outline.digest):
        matching = matching_digest(place, outline.digest)
        if matching is not None:
            name, digest = matching
            with explain_os_errors(f"the image of `{name}` cannot be stored"):
                return find_built(Store(paths.store_dir()), digest, name=name)
    return None


def ensure_lock(
    spec_path: Path, *, mirror: str | None = None, upgrade: bool = False, progress: Progress
) -> Lock:
    """Return the spec's lock; resolve and write it where there is none, or none that belongs to the spec."""
    digest = read_document(spec_path).digest
    places = _lock_places(lock_path(spec_path), digest)
    found = None if upgrade else next(filter(None, (matching_lock(place, digest) for place in places)), None)
    if found is not None:
        return found
    if places[0].exists() and not upgrade:
        progress.note(f"`{places[0]}` belongs to an older form of `{spec_path.name}`: resolving again")
    lock = resolve_spec(read_spec(spec_path), mirror=mirror, progress=progress)
    _write_lock(places, lock, progress)
    return lock


def _write_lock(places: Sequence[Path], lock: Lock, progress: Progress) -> None:
    """Write the lock to the first place that takes it."""
    for place in places:
        try:
            write_lock(place, lock)
        except OSError as refusal:
            if refusal.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            progress.note(f"the lock cannot be kept in `{place.parent}`: {refusal.strerror}")
        else:
            progress.note(f"locked in `{place}`")
            return
    raise MlenvError(
        f"the lock of {lock.name} cannot be written", hint="set MLENV_HOME to a directory of your own"
    )


def _lock_places(beside: Path, spec_digest: str) -> tuple[Path, Path]:
    """Return where a lock is looked for: beside the spec, else (a read-only spec) with mlenv's own data."""
    return beside, paths.data_dir() / "locks" / f"{spec_digest.removeprefix('sha256:')[:16]}.lock.json"


def resolve_spec(spec: Spec, *, mirror: str | None = None, progress: Progress) -> Lock:
    """Resolve a spec against this host's indexes and mirrors and return the lock."""
    from mlenv.resolve.host import facts
    from mlenv.resolve.resolver import resolve

    return resolve(spec, host=facts(), progress=progress, mirror=mirror).lock


def ensure_image(lock: Lock, *, spec_path: Path, mirror: str | None = None, progress: Progress) -> Image:
    """Return the lock's image from the store, built first where it is missing."""
    from mlenv.image import build
    from mlenv.image.store import Store
    from mlenv.launch.local import LocalRunner
    from mlenv.launch.sources import HostSources

    return build.ensure_image(
        lock,
        store=Store(paths.store_dir()),
        sources=HostSources(lock, spec_path=spec_path, mirror=mirror),
        run=LocalRunner(),
        progress=progress,
    )


def find_running(name: str) -> Container | None:
    """Return the running container of the environment `name`, or None."""
    return next((found for found in running() if found.environment == name), None)


def running() -> list[Container]:
    """Return the containers of all environments that are up."""
    from mlenv.container import lifecycle

    return [found for found in lifecycle.containers(all=False) if found.environment]


def down(name: str, *, progress: Progress) -> None:
    """Stop and remove the environment's container.

    Raises: NoSuchContainerError where the environment is not up.
    """
    from mlenv.container import lifecycle
    from mlenv.launch import local

    with _one_at_a_time(name):
        found = [container for container in lifecycle.containers() if container.environment == name]
        if not found:
            raise NoSuchContainerError(
                f"the environment `{name}` is not up", hint="`mlenv ps` lists what runs", code="not-up"
            )
        for container in found:
            with progress.step(f"stopping {name}"):
                local.stop_environment(container)


def _same_environment(container: Container, lock: Lock, folders: Sequence[Path], progress: Progress) -> None:
    """Refuse a container that runs an older lock; say which folders a running one does not show."""
    from mlenv.container.config import LOCK

    running_lock = container.config["annotations"].get(LOCK)
    if running_lock != lock.digest:
        raise MlenvError(
            f"the environment `{container.name}` is up with another lock",
            cause=f"it runs {running_lock}, its spec's lock is {lock.digest}",
            hint=f"`mlenv down {container.name}`, then `up` again",
            code="environment-changed",
        )
    shown = {mount["destination"] for mount in container.config["mounts"]}
    for folder in folders:
        if not any(str(place) in shown for place in (folder, *folder.parents)):
            progress.note(
                f"`{folder}` is not visible in `{container.name}`: it was brought up from another folder"
            )


@contextlib.contextmanager
def undo_on_failure() -> Iterator[ExitStack]:
    """Collect what takes a flow back, and run it when the flow fails; a second Ctrl-C cannot stop that."""
    with contextlib.ExitStack() as undo:
        try:
            yield undo
        except BaseException:
            polite_ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            heard = [signal.signal(polite_end, signal.SIG_IGN) for polite_end in polite_ends]
            try:
                undo.close()
            finally:
                for polite_end, handler in zip(polite_ends, heard, strict=True):
                    signal.signal(polite_end, handler)
            raise
        undo.pop_all()


@contextlib.contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """Let one `up` or `down` of an environment work at a time; the lock goes with its holder, file too."""
    path = paths.private_dir(paths.run_dir() / "environments") / f"{name}.lock"
    with contextlib.ExitStack() as held:
        while True:
            file = held.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_still(path, file.fileno()):
                break
        held.callback(path.unlink)  # while it is held: who waits for it finds another file, and tries again
        yield


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether `path` is the file that was opened, and was not removed by its last holder."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def project_folder(cwd: Path) -> Path:
    """Return the folder to mount for notebooks: `cwd`, unless that would hide the container's own system.

    Raises: MlenvError for `/` and the system's directories.
    """
    folder = Path(os.path.realpath(cwd))
    system = {
        "/usr",
        "/etc",
        "/bin",
        "/sbin",
        "/lib",
        "/lib64",
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/opt",
        "/var",
        "/boot",
    }
    if str(folder) == "/" or str(folder) in system:
        raise MlenvError(
            f"`{folder}` cannot be the notebook folder",
            cause="mounting it would hide the environment's own system",
            hint="change to a project folder and run the command there",
            code="unusable-folder",
        )
    return folder
