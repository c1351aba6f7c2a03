"""`mlenv save`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlenv.errors import UsageError

if TYPE_CHECKING:
    from mlenv.image.store import Store


@click.command("save")
@click.argument("image")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write to this file, not to stdout.",
)
def command(image: str, *, output: Path | None) -> None:
    """Write IMAGE as a tar archive of an OCI image layout, which other tools read.

    \b
    Example: mlenv save quickstart > quickstart.tar
    """  # noqa: D301 - click's paragraph mark
    from mlenv import paths
    from mlenv.image.save import save
    from mlenv.image.store import Store

    store = Store(paths.store_dir())
    if output is not None:
        _to_file(store, image, output)
        return
    if sys.stdout.isatty():
        raise UsageError("an image is not written to a terminal", hint=f"`mlenv save {image} > {image}.tar`")
    save(store, image, sys.stdout.buffer)


def _to_file(store: Store, image: str, output: Path) -> None:
    """Write beside the target and rename, so that a broken save leaves nothing."""
    from mlenv.image.save import save

    part = output.with_name(output.name + ".part")
    try:
        with part.open("wb") as stream:
            save(store, image, stream)
        part.rename(output)
    finally:
        part.unlink(missing_ok=True)
