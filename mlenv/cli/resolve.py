"""`mlenv resolve`: what a spec becomes, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlenv.cli import options, render

if TYPE_CHECKING:
    from mlenv.resolve.resolver import Resolution


@click.command("resolve")
@click.argument("name")
@click.option("--explain", is_flag=True, help="Say why each version was chosen, and what was rejected.")
@options.mirror
@options.as_json
def command(name: str, *, explain: bool, mirror: str | None, as_json: bool) -> None:
    """Resolve the spec NAME afresh and show the result; nothing is written.

    \b
    Example: mlenv resolve pytorch-2.13-cpu --explain
    """  # noqa: D301 - click's paragraph mark
    from mlenv.resolve.host import facts
    from mlenv.resolve.resolver import resolve
    from mlenv.spec.reader import read_spec
    from mlenv.spec.sources import locate

    spec = read_spec(locate(name, cwd=Path.cwd()))
    resolution = resolve(spec, host=facts(), progress=render.progress(), mirror=mirror)
    if as_json:
        _as_json(resolution)
    else:
        _as_text(resolution, explain=explain)


def _as_json(resolution: Resolution) -> None:
    import json

    from mlenv.lock.file import canonical_bytes

    reasons = [
        {
            "subject": reason.subject,
            "choice": reason.choice,
            "because": reason.because,
            "rejected": reason.rejected,
        }
        for reason in resolution.reasons
    ]
    render.json_data({"lock": json.loads(canonical_bytes(resolution.lock)), "reasons": reasons})


def _as_text(resolution: Resolution, *, explain: bool) -> None:
    if explain:
        for reason in resolution.reasons:
            render.data(f"{reason.subject}: {reason.choice}")
            render.data(f"  because {reason.because}")
            for other in reason.rejected:
                render.data(f"  not {other}")
        render.data("")
    lock = resolution.lock
    rows = [(wheel.name, wheel.version, render.size(wheel.size)) for wheel in lock.wheels]
    if lock.python:
        rows.insert(0, ("python", lock.python.version, lock.python.source))
    if lock.base:
        rows.insert(0, ("base", lock.base.name, f"{len(lock.base.packages)} packages"))
    if lock.image:
        rows.insert(0, ("image", lock.image.reference, lock.image.digest))
    render.table(("WHAT", "VERSION", "SIZE"), rows)
