"""`mlenv images`."""

from __future__ import annotations

import click

from mlenv.cli import options, render


@click.command("images")
@click.option("-q", "--quiet", is_flag=True, help="Print digests only.")
@options.as_json
def command(*, quiet: bool, as_json: bool) -> None:
    """List the images in the store; UNIQUE is what removing one would free, SHARED what others use too.

    \b
    Example: mlenv images
    """  # noqa: D301 - click's paragraph mark
    from mlenv import paths
    from mlenv.image.images import images
    from mlenv.image.store import Store

    found = images(Store(paths.store_dir()))
    if as_json:
        rows = [{"name": i.name, "digest": i.digest, "unique": i.unique, "shared": i.shared} for i in found]
        render.json_data({"images": rows})
    elif quiet:
        for image in found:
            render.data(image.digest)
    else:
        rows_ = [
            (i.name, i.digest.removeprefix("sha256:")[:12], render.size(i.unique), render.size(i.shared))
            for i in found
        ]
        render.table(("NAME", "IMAGE ID", "UNIQUE", "SHARED"), rows_)
