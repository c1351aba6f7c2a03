"""`mlenv run`: a command in a new container."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlenv.cli import options, render

if TYPE_CHECKING:
    from mlenv.image.build import Image
    from mlenv.launch.local import Options
    from mlenv.progress import Progress


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("image", metavar="IMAGE|NAME")
@click.argument("args", nargs=-1, metavar="[CMD]...", type=click.UNPROCESSED)
@click.option("-i", "--interactive", is_flag=True, help="Keep stdin open.")
@click.option(
    "-t", "--tty", is_flag=True, help="Give the container a terminal; Ctrl-P Ctrl-Q leaves it running."
)
@click.option("-d", "--detach", is_flag=True, help="Leave it in the background and print its id.")
@click.option("--rm", is_flag=True, help="Remove the container when it ends.")
@click.option("--name", help="Name the container.")
@options.publish
@click.option(
    "-v", "--volume", multiple=True, metavar="SRC:DST[:ro]", help="Mount a file or directory; repeatable."
)
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Set a variable; repeatable.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory inside.")
@click.option("-u", "--user", metavar="USER", help="User inside: name or uid, with :group if wanted.")
@click.option("--gpus", metavar="GPUS", help="all, none, a number, or indexes and UUIDs.")
@click.option("--memory", metavar="SIZE", help="Memory limit.")
@click.option("--cpus", type=float, help="How many processors' time it may use.")
@click.option("--pids-limit", type=int, metavar="N", help="How many processes and threads it may have.")
@click.option("--shm-size", metavar="SIZE", help="Size of /dev/shm [default: half of the memory].")
@click.option("--network", metavar="MODE", help="private, none or host [default: private].")
@click.option("--read-only", is_flag=True, help="Mount the root filesystem read-only.")
@options.mirror
def command(
    image: str, args: tuple[str, ...], *, detach: bool, rm: bool, name: str | None, **asked: Any
) -> int:
    """Run CMD in a new container of an image or a spec, and end with its status.

    \b
    Example: mlenv run --rm quickstart python -c 'import numpy; print(numpy.__version__)'
             mlenv run -it --name pt -p 8097:8097 quickstart /bin/bash
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import lifecycle
    from mlenv.launch.local import bundle_config

    progress = render.progress()
    chosen, defaults = _image(image, asked.pop("mirror"), progress)
    wanted = _options(defaults, args, asked)
    config = bundle_config(chosen, wanted, progress=progress)
    container = lifecycle.create(config, name=name, remove_on_exit=rm)
    try:
        lifecycle.start(container, interactive=asked["interactive"], attached=not detach)
    except BaseException:
        lifecycle.remove(container, force=True)
        raise
    for warning in container.warnings:
        progress.note(f"warning: {warning}")
    if detach:
        render.data(container.id)
        return 0
    return lifecycle.attach(container, stdin=asked["interactive"])


def _image(text: str, mirror: str | None, progress: Progress) -> tuple[Image, Options]:
    """Return the image that a spec's name or file means, else an image's reference, and its options."""
    from mlenv import environment, paths
    from mlenv.errors import ImageNotFoundError, SpecNotFoundError
    from mlenv.launch.local import Options, outline_options
    from mlenv.spec.reader import read_outline
    from mlenv.spec.sources import locate

    try:
        spec_path = locate(text, cwd=Path.cwd())
    except SpecNotFoundError as no_spec:
        from mlenv.image.images import find_image
        from mlenv.image.store import Store

        try:
            return find_image(Store(paths.store_dir()), text), Options()
        except ImageNotFoundError as no_image:
            raise ImageNotFoundError(
                f"`{text}` is neither an environment nor an image", cause=no_spec.message, hint=no_image.hint
            ) from no_spec
    outline = read_outline(spec_path)
    chosen = environment.build(spec_path, outline=outline, mirror=mirror, progress=progress)
    return chosen, outline_options(outline)


def _options(defaults: Options, args: tuple[str, ...], asked: dict[str, Any]) -> Options:
    """Return `defaults` with what the command line asks for on top."""
    from mlenv.launch.local import limited

    limits = {
        "memory": options.size(asked["memory"], "--memory"),
        "cpus": options.cpus(asked["cpus"]),
        "pids": asked["pids_limit"],
        "shm": options.size(asked["shm_size"], "--shm-size"),
    }
    resources = limited(defaults.resources, **limits)
    if asked["cpus"] == 0:  # none, as Docker means it; not even the spec's
        resources = replace(resources, cpus=None)
    return replace(
        defaults,
        args=args,
        env={**defaults.env, **options.environment_variables(asked["env"])},
        cwd=asked["workdir"],
        user=asked["user"],
        terminal=asked["tty"],
        mounts=[*defaults.mounts, *map(options.volume, asked["volume"])],
        ports=[*options.ports(asked["publish"]), *defaults.ports],
        network=asked["network"] or defaults.network,
        resources=resources,
        readonly=asked["read_only"],
        gpus=options.gpus(asked["gpus"]) or defaults.gpus,
    )
