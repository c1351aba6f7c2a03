"""`mlenv exec`: a command in a running container."""

from __future__ import annotations

import os

import click

from mlenv.cli import options


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("container")
@click.argument("args", nargs=-1, required=True, metavar="CMD...", type=click.UNPROCESSED)
@click.option("-i", "--interactive", is_flag=True, help="Keep stdin open.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="Set a variable; repeatable.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory inside.")
@click.option("-u", "--user", metavar="USER", help="User inside: name or uid, with :group if wanted.")
def command(
    container: str,
    args: tuple[str, ...],
    *,
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
) -> None:
    """Run CMD in the running CONTAINER and end with its status.

    \b
    Example: mlenv exec -it quickstart bash
    """  # noqa: D301 - click's paragraph mark
    from mlenv.container import launching, lifecycle

    found = lifecycle.find(container)
    env_fd = launching.environment_file(options.environment_variables(env)) if env else None
    words = launching.exec_command(found, args, env_fd=env_fd, cwd=workdir, user=user, terminal=tty)
    if not interactive:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(words[0], words)  # noqa: S606 - the core becomes this process, so that signals reach it directly
