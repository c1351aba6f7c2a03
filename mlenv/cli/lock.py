"""`mlenv lock`: pin a spec."""

from __future__ import annotations

from pathlib import Path

import click

from mlenv.cli import options, render


@click.command("lock")
@click.argument("name")
@click.option("--upgrade", is_flag=True, help="Resolve again although the lock belongs to the spec.")
@options.mirror
@options.as_json
def command(name: str, *, upgrade: bool, mirror: str | None, as_json: bool) -> None:
    """Write NAME.lock.json beside the spec NAME; commit it to git.

    \b
    Example: mlenv lock pytorch-2.13-cpu
    """  # noqa: D301 - click's paragraph mark
    from mlenv.environment import ensure_lock
    from mlenv.spec.sources import locate, lock_path

    path = locate(name, cwd=Path.cwd())
    lock = ensure_lock(path, mirror=mirror, upgrade=upgrade, progress=render.progress())
    if as_json:
        render.json_data({"name": lock.name, "lock": lock.digest, "path": str(lock_path(path))})
    else:
        render.data(lock.digest)
