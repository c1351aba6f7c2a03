"""`mlenv attach`."""

from __future__ import annotations

import click


@click.command("attach")
@click.argument("container")
def command(container: str) -> int:
    """Connect this terminal to a running CONTAINER; Ctrl-P Ctrl-Q leaves it running.

    \b
    Example: mlenv attach pt
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle

    return lifecycle.attach(lifecycle.find(container))
