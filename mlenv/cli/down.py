"""`mlenv down`: stop what `up` started."""

from __future__ import annotations

from pathlib import Path

import click

from mlenv.cli import render
from mlenv.errors import UsageError


@click.command("down")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Stop every environment and the JupyterLab server.")
def command(name: str | None, *, everything: bool) -> None:
    """Stop the environment NAME: its kernels, its container, and JupyterLab when it was the last.

    \b
    Example: mlenv down quickstart
             mlenv down --all
    """  # noqa: D301 - click's paragraph mark
    from mlenv import environment
    from mlenv.jupyter import server as jupyter
    from mlenv.kernel import kernelspec

    progress = render.progress()
    up = [container.environment for container in environment.running()]
    server = jupyter.find()
    for each in _chosen(name, up, everything=everything):
        if server is not None:
            jupyter.shutdown_kernels(server, each)
        kernelspec.remove(each)
        environment.down(each, progress=progress)
        progress.note(f"{each} is down")
    if server is not None and not environment.running():
        jupyter.stop()
        progress.note("JupyterLab is stopped")


def _chosen(name: str | None, up: list[str], *, everything: bool) -> list[str]:
    """Return the names to stop: the given one, all of them, or the only one."""
    if everything:
        return up
    if name is not None:
        return [name if name in up else _name_of(name)]
    if len(up) == 1:
        return up
    if not up:
        raise UsageError("no environment is up", hint="`mlenv up NAME` brings one up")
    raise UsageError(
        f"which one? {', '.join(sorted(up))} are up", hint="`mlenv down NAME`, or `mlenv down --all`"
    )


def _name_of(text: str) -> str:
    """Return the environment's name where `text` is a path to its spec, else `text` itself."""
    from mlenv.spec.reader import read_spec
    from mlenv.spec.sources import locate

    return (
        read_spec(locate(text, cwd=Path.cwd())).name
        if "/" in text or text.endswith((".yaml", ".yml"))
        else text
    )
