"""`mlenv start`."""

from __future__ import annotations

import click

from mlenv.cli import render


@click.command("start")
@click.argument("containers", nargs=-1, required=True, metavar="CONTAINER...")
@click.option("-a", "--attach", is_flag=True, help="Show what it prints, and end with its status.")
@click.option("-i", "--interactive", is_flag=True, help="Attach, and keep stdin open.")
def command(containers: tuple[str, ...], *, attach: bool, interactive: bool) -> int:
    """Start stopped containers again, with what they wrote.

    \b
    Example: mlenv start pt
             mlenv start -ai pt
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle
    from mlenv.errors import UsageError

    attached = attach or interactive
    if attached and len(containers) > 1:
        raise UsageError("only one container can be attached to", hint="start the others without -a and -i")
    for reference in containers:
        container = lifecycle.find(reference)
        lifecycle.start(container, interactive=interactive, attached=attached)
        if attached:
            return lifecycle.attach(container, stdin=interactive)
        render.data(reference)
    return 0
