"""A further process in a running container: in its namespaces and groups, with the same privileges.

The core process itself stays outside; it passes signals on, kills the process when its lifeline ends, and
ends with its status.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import os
import select

from mlenv.container import bundle as bundles
from mlenv.container import channel as channels
from mlenv.container import namespaces, process, security, state, syscalls
from mlenv.errors import ContainerError, NoSuchContainerError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from mlenv.container.channel import Channel

_PASSED_ON = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGTERM,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGCONT,
)
_SIGKILL = 9


class Request:
    """What is to be executed, and how."""

    __slots__ = ("args", "cwd", "directory", "environment", "lifeline_fd", "pid_fd", "terminal", "user")

    def __init__(self, arguments: Sequence[str]) -> None:
        words = list(arguments)
        self.environment: list[str] = []
        self.cwd: str | None = None
        self.user: str | None = None
        self.terminal = False
        self.pid_fd = self.lifeline_fd = -1
        while words and words[0].startswith("--") and words[0] != "--":
            self._read_option(words)
        if len(words) < 3 or words[1] != "--":  # noqa: PLR2004 - the directory, the dashes and a word
            raise UsageError("give a container's directory, `--` and a command")
        self.directory = words[0]
        self.args = words[2:]

    def _read_option(self, words: list[str]) -> None:
        option = words.pop(0)
        if option == "--terminal":
            self.terminal = True
            return
        if not words:
            raise UsageError(f"`{option}` needs a value")
        value = words.pop(0)
        if option == "--env":
            self.environment.append(value if "=" in value else f"{value}={os.environ[value]}")
        elif option == "--env-fd":
            with open(int(value), "rb") as file:
                self.environment += os.fsdecode(file.read()).split("\0")[:-1]
        elif option == "--cwd":
            self.cwd = value
        elif option == "--user":
            self.user = value
        elif option == "--pid-fd":
            self.pid_fd = int(value)
        elif option == "--lifeline-fd":
            self.lifeline_fd = int(value)
        else:
            raise UsageError(f"no such option: `{option}`")


def main(arguments: Sequence[str]) -> int:
    """Execute in a container and return the command's status.

    Raises: ContainerError; ContainerStartError with 125, 126 or 127.
    """
    request = Request(arguments)
    process.hold_signals(_PASSED_ON)
    if request.terminal:
        process.load_terminal()
    known = _running(request.directory)
    bundle = bundles.read(request.directory)
    pidfd = syscalls.pidfd_open(known["init"]["pid"])
    if not state.is_alive(known["init"]):
        raise _not_running(request.directory)
    pid, terminal_fd = _start(request, bundle, known, pidfd)
    os.close(pidfd)
    process.pass_signals(_PASSED_ON, pid)
    if request.pid_fd >= 0:
        os.write(request.pid_fd, f"{pid}\n".encode())
        os.close(request.pid_fd)
    if terminal_fd is not None:
        from mlenv.container import terminal

        return terminal.proxy(terminal_fd, pid)
    return _wait(pid, request.lifeline_fd)


def _running(directory: str) -> dict[str, Any]:
    try:
        known = state.read(directory)
    except FileNotFoundError:
        raise NoSuchContainerError(f"there is no container in `{directory}`") from None
    if known.get("status") != "running" or not known.get("init"):
        raise _not_running(directory)
    return known


def _not_running(directory: str) -> ContainerError:
    return ContainerError(
        f"container {os.path.basename(directory)[:12]} is not running",
        hint="start it first",
        code="not-running",
    )


def _start(
    request: Request, bundle: bundles.Bundle, known: dict[str, Any], pidfd: int
) -> tuple[int, int | None]:
    privileges = security.Privileges(bundle.process, bundle.system_call_filter)
    group = state.group_of(known)
    members = group.open_members()
    init_fd = process.sealed_init()
    for problem in [*([process.UNSEALED] if init_fd is None else ()), *group.problems]:
        os.write(2, f"warning: {problem}\n".encode())
    if known["users"] != "root":
        syscalls.setns(pidfd, syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    elif "pid" in bundle.namespaces:
        syscalls.setns(pidfd, syscalls.CLONE_NEWPID)
    ours, theirs = channels.Channel.pair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        joining = members if group.joins_itself else []
        _run_child(
            request,
            bundle,
            known,
            theirs,
            pidfd=pidfd,
            init_fd=init_fd,
            privileges=privileges,
            members=joining,
        )
    theirs.close()
    if init_fd is not None:
        os.close(init_fd)
    try:
        for member_fd in members:
            if not group.joins_itself:
                os.write(member_fd, str(pid).encode())
            os.close(member_fd)
        ours.send("go")
        return pid, channels.finish(ours)
    except BrokenPipeError:
        process.end(pid)
        raise channels.reported(ours) from None
    except BaseException:
        process.end(pid)
        raise
    finally:
        ours.close()


def _run_child(
    request: Request,
    bundle: bundles.Bundle,
    known: dict[str, Any],
    channel: Channel,
    *,
    pidfd: int,
    init_fd: int | None,
    privileges: security.Privileges,
    members: Sequence[int],
) -> NoReturn:
    try:
        for member_fd in members:
            os.write(member_fd, b"0")
        _join_and_execute(
            request, bundle, known, channel, pidfd=pidfd, init_fd=init_fd, privileges=privileges
        )
    except BaseException as error:  # noqa: BLE001 - everything is told to the parent
        channels.tell(channel, error)
    os._exit(125)


def _join_and_execute(
    request: Request,
    bundle: bundles.Bundle,
    known: dict[str, Any],
    channel: Channel,
    *,
    pidfd: int,
    init_fd: int | None,
    privileges: security.Privileges,
) -> None:
    os.setsid()
    syscalls.set_dumpable(0)
    process.keep_only({channel.socket.fileno(), pidfd} | ({init_fd} if init_fd is not None else set()))
    channels.expect(channel, "go")
    joined = [kind for kind in bundle.namespaces if kind not in ("user", "pid")]
    syscalls.setns(pidfd, namespaces.flags(joined))
    os.close(pidfd)
    root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    description = {**bundle.process, "args": request.args, "terminal": request.terminal}
    description["cwd"] = request.cwd or bundle.process["cwd"]
    description["env"] = [*bundle.process.get("env", ()), *request.environment]
    if request.user:
        identity = security.look_up(
            request.user, process.root_file(root_fd, "/etc/passwd"), process.root_file(root_fd, "/etc/group")
        )
    else:
        identity = process.read_identity(bundle, root_fd)
    if request.terminal:
        channel.send("terminal", "", process.open_terminal(root_fd, None, console=False))
    os.close(root_fd)
    process.execute(
        channel,
        description,
        identity,
        privileges,
        can_set_groups=known["users"] != "single",
        init_fd=init_fd,
        gives_streams=request.terminal,
    )


def _wait(pid: int, lifeline_fd: int) -> int:
    """Return the status of the process; the end of the lifeline kills it."""
    if lifeline_fd >= 0:
        _watch(pid, lifeline_fd)
    _, status = os.waitpid(pid, 0)
    return process.exit_status(status)


def _watch(pid: int, lifeline_fd: int) -> None:
    pidfd = syscalls.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(lifeline_fd, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if pidfd in ready:
            break
        if lifeline_fd in ready and not os.read(lifeline_fd, 1024):
            syscalls.pidfd_send_signal(pidfd, _SIGKILL)
            break
    os.close(pidfd)
