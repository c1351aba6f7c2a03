"""`mlenv ps`: the containers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from mlenv.cli import options, render

if TYPE_CHECKING:
    from mlenv.container.lifecycle import Container


@click.command("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Show stopped ones too.")
@click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
@options.as_json
def command(*, everything: bool, quiet: bool, as_json: bool) -> None:
    """List the running containers.

    \b
    Example: mlenv ps -a
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle

    found = lifecycle.containers(all=everything)
    if as_json:
        render.json_data({"containers": [_fields(container) for container in found]})
    elif quiet:
        for container in found:
            render.data(container.id[:12])
    else:
        header = ("CONTAINER ID", "IMAGE", "COMMAND", "STATUS", "PORTS", "NAME")
        render.table(header, [_row(container, time.time()) for container in found])


def _fields(container: Container) -> dict[str, Any]:
    return {
        "id": container.id,
        "name": container.name,
        "image": container.image,
        "environment": container.environment or None,
        "status": str(container.status),
        "pid": container.pid,
        "exit_code": container.exit_code,
        "created": container.created,
        "started": container.started,
        "finished": container.finished,
        "args": container.config["process"]["args"],
        "ports": [port.as_dict() for port in container.ports],
    }


def _row(container: Container, now: float) -> tuple[str, ...]:
    args = " ".join(container.config["process"]["args"])
    ports = ", ".join(
        f"{port.host_ip}:{port.host_port}->{port.container_port}/{port.protocol}" for port in container.ports
    )
    short = args if len(args) <= 24 else f"{args[:23]}…"  # noqa: PLR2004 - Docker's column
    return (container.id[:12], container.image, short, _status(container, now), ports, container.name)


def _status(container: Container, now: float) -> str:
    if container.status.is_running:
        return f"Up {render.age(container.started or now, now)}"
    if container.status.is_damaged:
        return "Damaged"
    if container.finished is not None:
        return f"Exited ({container.exit_code}) {render.age(container.finished, now)} ago"
    return "Created"
