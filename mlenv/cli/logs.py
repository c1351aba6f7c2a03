"""`mlenv logs`: what a container printed."""

from __future__ import annotations

import sys

import click


@click.command("logs")
@click.argument("container")
@click.option("-f", "--follow", is_flag=True, help="Keep showing what comes.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Show the last N lines only.")
def command(container: str, *, follow: bool, tail: int | None) -> None:
    """Show what CONTAINER wrote to stdout and stderr.

    \b
    Example: mlenv logs --tail 20 quickstart
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle

    streams = {"stdout": sys.stdout.buffer, "stderr": sys.stderr.buffer}
    for name, chunk in lifecycle.logs(lifecycle.find(container), follow=follow, tail=tail):
        streams[name].write(chunk)
        streams[name].flush()
