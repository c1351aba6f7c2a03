"""`mlenv stop`."""

from __future__ import annotations

import click

from mlenv.cli import render


@click.command("stop")
@click.argument("containers", nargs=-1, required=True, metavar="CONTAINER...")
@click.option(
    "-t",
    "--time",
    "timeout",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="Seconds before SIGKILL.",
)
def command(containers: tuple[str, ...], *, timeout: float) -> None:
    """Stop containers: SIGTERM, and SIGKILL for what still runs after the timeout.

    \b
    Example: mlenv stop -t 2 pt
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle

    for reference in containers:
        lifecycle.stop(lifecycle.find(reference), timeout=timeout)
        render.data(reference)
