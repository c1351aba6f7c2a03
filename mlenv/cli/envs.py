"""`mlenv envs`: which file a name means."""

from __future__ import annotations

from pathlib import Path

import click

from mlenv.cli import options, render


@click.command("envs")
@options.as_json
def command(*, as_json: bool) -> None:
    """List the environments found, and the file each name means.

    \b
    Example: mlenv envs
    """  # noqa: D301 - click's paragraph mark
    from mlenv.environment import running
    from mlenv.spec.sources import catalog, lock_path

    up = {container.environment for container in running()}
    found = catalog(Path.cwd())
    if as_json:
        rows = [
            {"name": name, "path": str(path), "locked": lock_path(path).exists(), "up": name in up}
            for name, path in found
        ]
        render.json_data({"environments": rows})
        return
    render.table(
        ("NAME", "STATUS", "LOCK", "FILE"),
        [
            (name, "up" if name in up else "down", "yes" if lock_path(path).exists() else "no", str(path))
            for name, path in found
        ],
    )
