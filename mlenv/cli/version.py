"""`mlenv version`."""

from __future__ import annotations

import click

from mlenv import __version__
from mlenv.cli import options, render


@click.command("version")
@options.as_json
def command(*, as_json: bool) -> None:
    """Show the version.

    \b
    Example: mlenv version --json
    """  # noqa: D301 - click's paragraph mark
    if as_json:
        render.json_data({"version": __version__})
    else:
        render.data(f"mlenv {__version__}")
