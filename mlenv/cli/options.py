"""Options that several commands share, and the values their texts stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlenv.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlenv.container.config import Mount, Port

Command = TypeVar("Command", bound="Callable[..., Any]")


def as_json(command: Command) -> Command:
    """Add `--json`: one object on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def mirror(command: Command) -> Command:
    """Add `--mirror`: the Debian mirror to use instead of the host's."""
    return click.option(
        "--mirror",
        metavar="URL",
        envvar="MLENV_DEBIAN_MIRROR",
        help="Debian mirror to take base systems from [default: the host's apt configuration].",
    )(command)


def publish(command: Command) -> Command:
    """Add `-p`: ports to publish on the host."""
    return click.option(
        "-p",
        "--publish",
        multiple=True,
        metavar="[IP:]HOST:CONTAINER",
        help="Publish a container's port on the host, on 127.0.0.1 unless an address is given; repeatable.",
    )(command)


def ports(texts: Sequence[str]) -> list[Port]:
    """Return the ports that `-p` texts mean.

    Raises: UsageError for a text that is none.
    """
    from mlenv.container.config import Port
    from mlenv.spec.values import parse_port

    found = []
    for text in texts:
        try:
            port = parse_port(text)
        except ValueError as fault:
            raise UsageError(
                f"`-p {text}` is no port mapping", cause=str(fault), hint="write `-p 8097:8097`"
            ) from fault
        found.append(
            Port(
                host_ip=port.host_ip,
                host_port=port.host_port,
                container_port=port.container_port,
                protocol=port.protocol,
            )
        )
    return found


def volume(text: str) -> Mount:
    """Return the mount that a `-v SRC:DST[:ro]` text means.

    Raises: UsageError for a text that is none, or a source that does not exist.
    """
    from pathlib import Path, PurePosixPath

    from mlenv.container.config import Mount

    words = text.split(":")
    if len(words) not in (2, 3) or not all(words) or (len(words) == 3 and words[2] not in ("ro", "rw")):  # noqa: PLR2004
        raise UsageError(
            f"`-v {text}` is no volume", hint="write `-v SOURCE:TARGET` or `-v SOURCE:TARGET:ro`"
        )
    source = Path(words[0]).expanduser().absolute()
    if not source.exists():
        raise UsageError(f"`-v {text}`: `{source}` does not exist", hint="create it first")
    if not words[1].startswith("/"):
        raise UsageError(
            f"`-v {text}`: the target must be an absolute path", hint=f"write `{words[0]}:/{words[1]}`"
        )
    return Mount(source=source, target=PurePosixPath(words[1]), readonly=words[2:] == ["ro"])


def cpus(count: float | None) -> float | None:
    """Return how many processors' time `--cpus` allows; None where it is not given.

    Raises: UsageError for what is no number of processors.
    """
    if count is None or 0 <= count < float("inf"):
        return count
    raise UsageError(
        f"`--cpus {count:g}` is no number of processors", hint="write `--cpus 1.5`; 0 is no limit"
    )


def size(text: str | None, option: str) -> int | None:
    """Return the bytes a size such as 16GB or 512m means.

    Raises: UsageError for a text that is none.
    """
    from mlenv.spec.values import parse_size

    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as fault:
        raise UsageError(
            f"`{option} {text}` is no size", cause=str(fault), hint=f"write `{option} 16GB`"
        ) from fault


def environment_variables(texts: Sequence[str]) -> dict[str, str]:
    """Return the variables of `-e K=V` texts; `-e K` alone passes the host's value on, as Docker does."""
    import os

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name:
            raise UsageError(f"`-e {text}` names no variable", hint="write `-e NAME=VALUE`")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def gpus(text: str | None) -> Any:
    """Return the selection that a `--gpus` text means, None where it was not given."""
    from mlenv.spec.values import parse_gpus

    if text is None:
        return None
    try:
        return parse_gpus(text)
    except ValueError as fault:
        raise UsageError(
            f"`--gpus {text}` selects nothing", cause=str(fault), hint="write `--gpus all`"
        ) from fault
