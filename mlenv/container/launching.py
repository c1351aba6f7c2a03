"""The core as a fresh process: a threaded one, as a notebook server is, may make no user namespace."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlenv import paths
from mlenv.container import record

if TYPE_CHECKING:
    import _socket
    from collections.abc import Mapping, Sequence

    from mlenv.container.lifecycle import Container

CORE = Path(__file__).with_name("__main__.py")


def spawn_shim(
    directory: str, container_id: str, *, interactive: bool, attached: bool
) -> tuple[dict[str, Any], _socket.socket | None]:
    """Start the shim of the container in `directory`; return its answer and our end of the first attachment.

    The answer has `ok`, or `message`, `cause`, `hint`, `status` and `code` of what failed.
    """
    import _socket

    answer_read, answer_write = os.pipe()
    ours = theirs = None
    if attached:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    answer_fd, client_fd = 3, 4
    # Descriptors are copied out of the way first, so that none is overwritten before it is used.
    high_answer = _above(answer_write, 10)
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, f"{directory}/shim.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, high_answer, answer_fd),
    ]
    high_client = -1
    if theirs is not None:
        high_client = _above(theirs.fileno(), 10)
        actions.append((os.POSIX_SPAWN_DUP2, high_client, client_fd))
    socket_path = str(paths.socket_dir() / "a" / container_id[:12])
    words = [
        *core_command("shim"),
        directory,
        socket_path,
        str(answer_fd),
        str(client_fd if attached else -1),
        "interactive" if interactive else "-",
    ]
    try:
        pid = os.posix_spawn(sys.executable, words, os.environ, file_actions=actions)
    finally:
        for descriptor in (answer_write, high_answer, high_client):
            if descriptor >= 0:
                os.close(descriptor)
        if theirs is not None:
            theirs.close()
    os.waitpid(pid, 0)
    text = b""
    try:
        while chunk := os.read(answer_read, 65536):
            text += chunk
    finally:
        os.close(answer_read)
    if not text:
        complaint = _tail(f"{directory}/shim.log")
        return {
            "message": "the container's shim ended without a word",
            "cause": complaint,
            "status": 125,
        }, ours
    answer: dict[str, Any] = record.parse(text.decode())
    return answer, ours


def _above(descriptor: int, lowest: int) -> int:
    """Return a close-on-exec copy of a descriptor numbered `lowest` or higher."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)


def core_command(command: str) -> list[str]:
    """Return the words that start the core as a fresh process; it must not be forked from a threaded one."""
    return [sys.executable, "-I", "-S", str(CORE), command]


def _tail(path: str) -> str | None:
    try:
        return Path(path).read_text("utf-8", "replace")[-2000:].strip() or None
    except FileNotFoundError:
        return None


def exec_command(
    container: Container,
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    inherited: Sequence[str] = (),
    cwd: str | None = None,
    user: str | None = None,
    terminal: bool = False,
    env_fd: int | None = None,
    pid_fd: int | None = None,
    lifeline_fd: int | None = None,
) -> list[str]:
    """Return the words of the process that runs `args` in the container with our standard streams.

    The values of `env` show in `ps`, those in `env_fd` (an `environment_file`) and those of the variables
    that `inherited` names in that process's own environment do not. It passes signals on and ends with the
    command's status, 125, 126 or 127 as Docker. It writes the command's host pid and a newline to `pid_fd`
    once it has been executed; the end of `lifeline_fd` kills the command.
    """
    words = core_command("exec")
    for key, value in (env or {}).items():
        words += ["--env", f"{key}={value}"]
    for key in inherited:
        words += ["--env", key]
    options = (
        ("--env-fd", env_fd),
        ("--cwd", cwd),
        ("--user", user),
        ("--pid-fd", pid_fd),
        ("--lifeline-fd", lifeline_fd),
    )
    for option, wanted in options:
        if wanted is not None:
            words += [option, str(wanted)]
    if terminal:
        words.append("--terminal")
    return [*words, str(container.bundle), "--", *args]


def environment_file(variables: Mapping[str, str]) -> int:
    """Return an inheritable descriptor that holds variables, each ended by a NUL, for `exec_command`."""
    file_fd = os.memfd_create("environment", 0)
    with open(file_fd, "wb", closefd=False) as file:
        file.writelines(os.fsencode(f"{name}={value}\0") for name, value in variables.items())
    os.lseek(file_fd, 0, os.SEEK_SET)
    return file_fd
