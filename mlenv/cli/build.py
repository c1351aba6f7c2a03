"""`mlenv build`: an image from a lock."""

from __future__ import annotations

from pathlib import Path

import click

from mlenv.cli import options, render


@click.command("build")
@click.argument("name")
@options.mirror
@options.as_json
def command(name: str, *, mirror: str | None, as_json: bool) -> None:
    """Build the image of the spec NAME and print its digest.

    What the store already has is not built again.

    \b
    Example: mlenv build quickstart
    """  # noqa: D301 - click's paragraph mark
    from mlenv import environment
    from mlenv.spec.sources import locate

    image = environment.build(locate(name, cwd=Path.cwd()), mirror=mirror, progress=render.progress())
    if as_json:
        render.json_data({"name": image.name, "digest": image.digest})
    else:
        render.data(image.digest)
