"""Translate paths between the host and a container, through the container's bind mounts."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def container_path(config: Mapping[str, Any], host_path: Path) -> PurePosixPath | None:
    """Return where `host_path` lies in the container, or None where it is not mounted."""
    for source, destination in _binds(config):
        if host_path.is_relative_to(source):
            return destination / host_path.relative_to(source)
    return None


def host_path(config: Mapping[str, Any], container_path: PurePosixPath) -> Path | None:
    """Return where `container_path` lies on the host, or None where it is the container's own."""
    for source, destination in _binds(config):
        if container_path.is_relative_to(destination):
            return source / container_path.relative_to(destination)
    return None


def _binds(config: Mapping[str, Any]) -> Iterator[tuple[Path, PurePosixPath]]:
    """Yield (source, destination) of the bind mounts, the deepest destination first.

    Source: OCI runtime-spec config.md, "Mounts": a mount is a bind where its options hold `bind` or `rbind`.
    """
    mounts = [
        (Path(mount["source"]), PurePosixPath(mount["destination"]))
        for mount in config.get("mounts", ())
        if mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options", ()))
    ]
    yield from sorted(mounts, key=lambda pair: len(pair[1].parts), reverse=True)
