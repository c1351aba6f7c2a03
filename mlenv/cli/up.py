"""`mlenv up`: spec, lock, image, container, kernel and JupyterLab in one word."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlenv.cli import options, render
from mlenv.cli.main import hear_no_more

if TYPE_CHECKING:
    from contextlib import ExitStack

    from mlenv.environment import Environment
    from mlenv.jupyter.server import Server
    from mlenv.progress import Progress

DEFAULT_PORT = 8888
"""Where JupyterLab listens unless `--port` says otherwise (its own default)."""


@click.command("up")
@click.argument("name")
@options.publish
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help=f"JupyterLab's port [default: {DEFAULT_PORT} or the next free].",
)
@click.option(
    "--gpus", metavar="GPUS", help="all, none, a number, or indexes and UUIDs; instead of the spec's `gpus`."
)
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
@click.option("--no-jupyter", is_flag=True, help="Start the container and its kernelspec, but no JupyterLab.")
@click.option("-d", "--detach", is_flag=True, help="Stay in the background: as always, and open no browser.")
@options.mirror
@options.as_json
def command(
    name: str,
    *,
    publish: tuple[str, ...],
    port: int | None,
    gpus: str | None,
    no_browser: bool,
    no_jupyter: bool,
    detach: bool,
    mirror: str | None,
    as_json: bool,
) -> None:
    """Bring the environment NAME up and print JupyterLab's URL.

    Resolves and locks what is not locked, builds what is missing, starts the container, registers its kernel
    and starts JupyterLab, or joins the one that runs. NAME is a spec's name, a YAML file or a directory.

    \b
    Example: mlenv up quickstart
             mlenv up envs/train.yaml -p 8097:8097 --port 8889
    """  # noqa: D301 - click's paragraph mark
    from mlenv import environment
    from mlenv.kernel import kernelspec

    progress = render.progress()
    folder = environment.project_folder(Path.cwd())
    asked = {"publish": options.ports(publish), "gpus": options.gpus(gpus)}
    prepared = environment.prepare(name, cwd=Path.cwd(), mirror=mirror, progress=progress)
    with environment.undo_on_failure() as undo:
        server = None if no_jupyter else _server(folder, port, undo, progress)
        folders = [server.root_dir, folder] if server else [folder]
        up = environment.start(prepared, folders=folders, progress=progress, undo=undo, **asked)
        if up.started:
            undo.callback(kernelspec.remove, up.spec.name)
        kernelspec.install_environment(up)
        if server is not None:
            server.wait()
        _announce(up, server, progress, as_json=as_json, browser=not (no_browser or detach or no_jupyter))
        hear_no_more()


def _server(folder: Path, port: int | None, undo: ExitStack, progress: Progress) -> Server:
    """Start JupyterLab, or join the one that runs, while the environment is being prepared."""
    from mlenv.jupyter import server as jupyter

    server = jupyter.start_or_join(folder, port=port or DEFAULT_PORT, explicit_port=port is not None)
    if server.started:
        undo.callback(jupyter.stop)
    elif port is not None and server.port != port:
        progress.note(f"JupyterLab already runs on port {server.port}: joining it")
    if server.started and port is None and server.port != DEFAULT_PORT:
        progress.note(f"port {DEFAULT_PORT} is taken{server.taken_by}: JupyterLab listens on {server.port}")
    return server


def _announce(
    up: Environment, server: Server | None, progress: Progress, *, as_json: bool, browser: bool
) -> None:
    if as_json:
        render.json_data(
            {
                "name": up.spec.name,
                "spec": str(up.spec.path),
                "lock": up.lock.digest,
                "image": up.image.digest,
                "container": up.container.id,
                "started": up.started,
                "kernel": up.spec.name,
                "url": server.url if server else None,
                "ports": [port.as_dict() for port in up.container.ports],
            }
        )
        return
    for port in up.container.ports:
        progress.note(f"port {port.container_port} of the container is {port.host_ip}:{port.host_port}")
    progress.note(
        f"{up.spec.name} is up{'' if up.started else ' already'}; `mlenv down {up.spec.name}` stops it"
    )
    if server is None:
        return
    progress.note("open this in a browser and choose the kernel:")
    render.data(server.url)
    if browser and sys.stderr.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        import webbrowser

        webbrowser.open(server.page.as_uri())
