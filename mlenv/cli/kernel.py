"""`mlenv kernel`: the kernelspecs of environments."""

from __future__ import annotations

import click

from mlenv.cli import options, render


@click.group("kernel")
def command() -> None:
    """Manage the Jupyter kernelspecs of environments."""


@command.command("list")
@options.as_json
def list_(*, as_json: bool) -> None:
    """List the kernelspecs that mlenv installed.

    \b
    Example: mlenv kernel list
    """  # noqa: D301 - click's paragraph mark
    from mlenv.kernel import kernelspec

    found = kernelspec.installed()
    if as_json:
        rows = [
            {"name": spec.name, "display_name": spec.display_name, "path": str(spec.path)} for spec in found
        ]
        render.json_data({"kernels": rows})
    else:
        render.table(
            ("NAME", "DISPLAY NAME", "DIRECTORY"), [(s.name, s.display_name, str(s.path)) for s in found]
        )
