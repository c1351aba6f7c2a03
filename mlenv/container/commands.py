"""The core's own command line: run a bundle in the foreground, execute in a container, be its shim."""

from __future__ import annotations

import os

from mlenv.errors import ContainerError, MlenvError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """usage: python -I -S mlenv/container/__main__.py run --bundle DIR [--root DIR] ID
       python -I -S mlenv/container/__main__.py exec [OPTION...] DIR -- ARG...
       python -I -S mlenv/container/__main__.py shim DIR SOCKET ANSWER_FD CLIENT_FD interactive|-
       python -I -S mlenv/container/__main__.py delete DIR
       python -I -S mlenv/container/__main__.py probe"""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    try:
        return _dispatch(list(arguments))
    except MlenvError as error:
        os.write(2, f"{error}\n".encode())
        return error.exit_status
    except OSError as error:  # what the host refused; the text names the call
        os.write(2, f"{ContainerError('the container could not be run', cause=str(error))}\n".encode())
        return ContainerError.exit_status
    except KeyboardInterrupt:
        return 130


def _dispatch(arguments: list[str]) -> int:
    command = arguments.pop(0) if arguments else ""
    if command == "shim" and os.fork():
        return 0  # whoever started us reaps this one; the shim itself belongs to the machine's init
    if command not in ("run", "exec", "shim"):
        return _quick(command, arguments)
    if command == "run":
        from mlenv.container import foreground

        return foreground.run(**_options(arguments))
    if command == "exec":
        from mlenv.container import execution

        return execution.main(arguments)
    from mlenv.container import shim

    return shim.main(arguments)


def _quick(command: str, arguments: list[str]) -> int:
    if command == "delete" and len(arguments) == 1:
        from mlenv.container import removal

        removal.remove(arguments[0])
        return 0
    if command == "probe" and not arguments:
        from mlenv.container import probe, record

        os.write(1, record.serialise(probe.facts()))
        return 0
    raise UsageError(f"no such command: `{command}`", hint=USAGE)


def _options(arguments: list[str]) -> dict[str, str]:
    """Return `--bundle`, `--root` and ID by name."""
    found = {"bundle": "."}
    names = []
    while arguments:
        word = arguments.pop(0)
        if word in ("--bundle", "-b", "--root"):
            if not arguments:
                raise UsageError(f"`{word}` needs a directory", hint=USAGE)
            found["root" if word == "--root" else "bundle"] = arguments.pop(0)
        elif word.startswith("-"):
            raise UsageError(f"no such option: `{word}`", hint=USAGE)
        else:
            names.append(word)
    if len(names) != 1:
        raise UsageError("give one container id", hint=USAGE)
    return {**found, "container_id": names[0]}
