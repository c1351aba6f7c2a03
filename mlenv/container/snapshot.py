"""What is known of a container, read from its directory at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from mlenv.container import bundle as bundles
from mlenv.container import record, state

if TYPE_CHECKING:
    import _socket
    from pathlib import Path

    from mlenv.container.config import Port


class Status(str, Enum):
    """Where a container is in its life. Source: OCI runtime-spec 1.0.2 runtime.md "State"."""

    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"
    DAMAGED = "damaged"
    """Ours: its state cannot be read, and so it can only be removed."""

    def __str__(self) -> str:
        """Return the status as `ps` shows it."""
        return self.value

    @property
    def is_running(self) -> bool:
        """Whether its process runs."""
        return self is Status.RUNNING

    @property
    def is_damaged(self) -> bool:
        """Whether its state cannot be read."""
        return self is Status.DAMAGED


@dataclass(kw_only=True, slots=True)
class Container:
    """A container as it was when it was looked at.

    `pid` is PID 1's on the host; times are seconds of the epoch.
    """

    id: str
    name: str
    status: Status
    pid: int | None
    exit_code: int | None
    created: float
    started: float | None
    finished: float | None
    config: dict[str, Any]
    bundle: Path
    ports: tuple[Port, ...]
    oom_killed: bool = False
    warnings: tuple[str, ...] = ()
    channel: _socket.socket | None = field(default=None, repr=False, compare=False)

    @property
    def image(self) -> str:
        """Return the image's reference, empty for a bundle without one."""
        return str(self.config.get("annotations", {}).get(bundles.IMAGE, ""))

    @property
    def environment(self) -> str:
        """Return the name of the environment this is, empty for any other container."""
        return str(self.config.get("annotations", {}).get(bundles.ENVIRONMENT, ""))


def damaged(directory: Path, why: str) -> Container:
    """Return a container of which the disk has lost the state, so that it can be seen and removed."""
    try:
        created = directory.stat().st_mtime
    except FileNotFoundError:
        created = 0.0
    try:
        config = record.read(str(directory / "config.json"))
        name = config["annotations"][bundles.NAME]
    except (OSError, ValueError, KeyError, TypeError):  # damaged too
        config, name = {"process": {"args": []}}, directory.name[:12]
    return Container(
        id=directory.name,
        name=name,
        status=Status.DAMAGED,
        pid=None,
        exit_code=None,
        created=created,
        started=None,
        finished=None,
        config=config,
        bundle=directory,
        ports=(),
        warnings=(f"its state is damaged: {why}",),
    )


def _checked_state(directory: str) -> dict[str, Any]:
    """Return a container's state. Raises: OSError; ValueError for a damaged one."""
    known = state.read(directory)
    missing = {"id", "name", "status", "created"} - known.keys()
    if missing:
        raise ValueError(f"`{directory}/{state.STATE_FILE}` has no {', '.join(sorted(missing))}")
    return known


def load(directory: Path) -> Container:
    """Return the container of this directory. Raises: OSError; ValueError for a damaged one."""
    from mlenv.container.config import Port

    known = _checked_state(str(directory))
    config = record.read(str(directory / "config.json"))
    asked = record.parse(config.get("annotations", {}).get(bundles.PORTS, "[]"))
    status = Status(known["status"])
    return Container(
        id=known["id"],
        name=known["name"],
        status=status,
        pid=known["init"]["pid"] if status.is_running else None,
        exit_code=known.get("exit_code"),
        created=known["created"],
        started=known.get("started"),
        finished=known.get("finished"),
        config=config,
        bundle=directory,
        ports=tuple(Port(**port) for port in known.get("ports", asked)),
        oom_killed=bool(known.get("out_of_memory_kills")),
        warnings=tuple(known.get("warnings", ())),
    )
