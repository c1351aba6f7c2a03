"""`mlenv kill`."""

from __future__ import annotations

import signal as signals

import click

from mlenv.cli import render
from mlenv.errors import UsageError


@click.command("kill")
@click.argument("containers", nargs=-1, required=True, metavar="CONTAINER...")
@click.option(
    "-s", "--signal", "name", default="KILL", show_default=True, metavar="SIG", help="Name or number."
)
def command(containers: tuple[str, ...], *, name: str) -> None:
    """Send a signal to the first process of containers.

    \b
    Example: mlenv kill -s USR1 pt
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle

    number = _number(name)
    for reference in containers:
        lifecycle.kill(lifecycle.find(reference), number)
        render.data(reference)


def _number(text: str) -> int:
    """Return the number of a signal given as 9, KILL or SIGKILL."""
    try:
        return (
            signals.Signals(int(text))
            if text.isdecimal()
            else signals.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
        )
    except (KeyError, ValueError):
        raise UsageError(f"there is no signal `{text}`", hint="`kill -l` lists them") from None
