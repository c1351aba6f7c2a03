"""`mlenv rm`."""

from __future__ import annotations

import click

from mlenv.cli import render


@click.command("rm")
@click.argument("containers", nargs=-1, required=True, metavar="CONTAINER...")
@click.option("-f", "--force", is_flag=True, help="Kill it first if it runs.")
def command(containers: tuple[str, ...], *, force: bool) -> None:
    """Remove containers and what they wrote.

    \b
    Example: mlenv rm -f pt
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle

    for reference in containers:
        lifecycle.remove(lifecycle.find(reference), force=force)
        render.data(reference)
