"""The command line: a table of commands, each imported when chosen, and one place that prints errors."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import click

    from mlenv.errors import MlenvError

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("mlenv.cli.up", "Bring an environment up and open it in JupyterLab."),
    "down": ("mlenv.cli.down", "Stop what `up` started."),
    "envs": ("mlenv.cli.envs", "List the environments found and which file each name means."),
    "resolve": ("mlenv.cli.resolve", "Show what a spec resolves to, and why."),
    "lock": ("mlenv.cli.lock", "Write the lock of a spec."),
    "build": ("mlenv.cli.build", "Build the image of a spec."),
    "images": ("mlenv.cli.images", "List images."),
    "save": ("mlenv.cli.save", "Write an image as an OCI layout archive."),
    "run": ("mlenv.cli.run", "Run a command in a new container."),
    "start": ("mlenv.cli.start", "Start stopped containers again."),
    "attach": ("mlenv.cli.attach", "Connect this terminal to a running container."),
    "exec": ("mlenv.cli.exec", "Run a command in a running container."),
    "ps": ("mlenv.cli.ps", "List containers."),
    "logs": ("mlenv.cli.logs", "Show what a container printed."),
    "stop": ("mlenv.cli.stop", "Stop containers."),
    "kill": ("mlenv.cli.kill", "Send a signal to containers."),
    "rm": ("mlenv.cli.rm", "Remove containers."),
    "kernel": ("mlenv.cli.kernel", "Manage the Jupyter kernelspecs of environments."),
    "version": ("mlenv.cli.version", "Show the version."),
}
"""Name, module (its `command` is the click command) and one-line help of every command."""

FAILED_BEFORE_THE_COMMAND = 125
"""Exit status of `run` and its like where mlenv failed and not the command (Docker's)."""


_COLLECTED_AFTER = 50_000
"""Objects made between two garbage collections; with Python's 700 they take 5 of 80 ms before a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    gc.set_threshold(_COLLECTED_AFTER)
    words = list(sys.argv[1:] if arguments is None else arguments)
    for polite_end in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(polite_end) is not signal.SIG_IGN:  # nohup(1) asks to outlive the terminal
            signal.signal(polite_end, _interrupt)
    try:
        status = run(words)
    except KeyboardInterrupt:  # between the command's end and ours
        status = 130
    hear_no_more()
    if arguments is None:
        _leave(status)
    sys.exit(status)


def _leave(status: int) -> None:
    """End the process at once: all is done, and taking the interpreter apart costs a tenth of `mlenv run`.

    Returns where an output cannot be written; Python's own way out says so.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # a caller may have closed it
                stream.flush()
    except (OSError, ValueError):
        return
    os._exit(status)


def hear_no_more() -> None:
    """Ignore polite ends from here on: what was asked for is done, and too late to be undone."""
    for polite_end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(polite_end, signal.SIG_IGN)


def run(words: Sequence[str]) -> int:
    """Run one command and return the exit status; errors are printed here and nowhere else."""
    if list(words) in (["--version"], ["-V"]):
        from mlenv import __version__

        sys.stdout.write(f"mlenv {__version__}\n")
        return 0
    try:
        return _invoke(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # noqa: BLE001 - what is not an error of ours is raised again
        return _report(error, words)


def _invoke(words: Sequence[str]) -> int:
    import click

    try:
        result = _group().main(list(words), prog_name="mlenv", standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort:
        return 130
    except click.ClickException as fault:
        from mlenv.errors import UsageError

        raise _usage(fault, UsageError) from fault
    return result if isinstance(result, int) else 0


def _usage(fault: click.ClickException, kind: type[Any]) -> Exception:
    import click

    context = getattr(fault, "ctx", None)
    hint = f"{context.command_path} --help" if isinstance(context, click.Context) else "mlenv --help"
    return kind(fault.format_message().rstrip("."), hint=f"`{hint}` shows what it takes")  # type: ignore[no-any-return]


def _report(error: Exception, words: Sequence[str]) -> int:
    from mlenv.cli import render
    from mlenv.errors import MlenvError

    known = error if isinstance(error, MlenvError) else _of_the_system(error)
    if known is None:
        raise error
    render.error(known, as_json="--json" in _own_words(words))
    if known.exit_status == 1 and _passes_a_status_on(words):
        return FAILED_BEFORE_THE_COMMAND
    return known.exit_status


def _passes_a_status_on(words: Sequence[str]) -> bool:
    """Return whether the command ends with another's status, so that 1 must not be ours."""
    return list(words[:1]) in (["run"], ["exec"], ["attach"]) or (
        list(words[:1]) == ["start"] and any(word in ("-a", "-i", "-ai", "-ia", "--attach") for word in words)
    )


def _own_words(words: Sequence[str]) -> list[str]:
    """Return the words before a `--`, which are mlenv's own."""
    return list(words[: words.index("--")]) if "--" in words else list(words)


def _of_the_system(error: Exception) -> MlenvError | None:
    """Translate what the system refused into an error with a remedy, or None for a fault of ours."""
    import errno

    from mlenv.errors import MlenvError

    if not isinstance(error, OSError):
        return None
    place = f" `{error.filename}`" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MlenvError(
            f"no space left to write{place}",
            cause=str(error),
            hint="free some space, or set MLENV_HOME to a larger disk; then run the same command again",
            code="disk-full",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return MlenvError(
            f"not allowed to use{place}",
            cause=str(error),
            hint="set MLENV_HOME to a directory of your own",
            code="permission-denied",
        )
    return None


def _interrupt(number: int, frame: object) -> None:
    """Treat a polite end (SIGTERM, SIGHUP) like Ctrl-C, so that everything is undone."""
    del number, frame
    raise KeyboardInterrupt


def _group() -> click.Group:
    import click

    class Commands(click.Group):
        """A group whose commands are imported when they are chosen."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            del ctx
            return list(COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            del ctx
            entry = COMMANDS.get(cmd_name)
            return importlib.import_module(entry[0]).command if entry else None

        def resolve_command(
            self, ctx: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            if args and args[0] not in COMMANDS and not args[0].startswith("-"):
                from difflib import get_close_matches

                from mlenv.errors import UsageError

                near = get_close_matches(args[0], COMMANDS, n=1)
                hint = f"did you mean `mlenv {near[0]}`?" if near else "`mlenv --help` lists the commands"
                raise UsageError(f"there is no command `{args[0]}`", hint=hint)
            return super().resolve_command(ctx, args)

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            del ctx
            with formatter.section("Commands"):
                formatter.write_dl([(name, help_) for name, (_, help_) in COMMANDS.items()])

    return Commands(
        name="mlenv",
        help="Reproducible ML environments: a YAML spec, its lock, a container, a kernel in JupyterLab.",
        epilog="Example: mlenv up quickstart",
        params=[click.Option(["--version", "-V"], is_flag=True, help="Show the version.")],
        context_settings={"help_option_names": ["-h", "--help"]},
    )
