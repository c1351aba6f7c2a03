"""`mlenv rmi`."""

from __future__ import annotations

import click

from mlenv.cli import render


@click.command("rmi")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
def command(images: tuple[str, ...]) -> None:
    """Remove images, and what no other image and no container uses.

    \b
    Example: mlenv rmi quickstart
    """  # noqa: D301 - click's paragraph mark
    from mlenv import paths
    from mlenv.image.store import Store, remove

    for reference in images:
        freed = remove(Store(paths.store_dir()), reference)
        render.note(f"{reference}: {render.size(freed)} freed")
        render.data(reference)
