"""From a bundle to a running process: the parent prepares, the child assembles, and they meet at one byte.

    parent                                   child, PID 1 of its namespaces
    ------                                   ------------------------------
    fork ----------------------------------> new mount, ipc, uts and network namespaces
    (rootless: map the users first)          "ready"
    (v2: put it in its cgroup)               v1: its cgroups; assemble the root: nothing here needs the parent
    set up its network
    "go" ----------------------------------> cgroup namespace, pivot, terminal, privileges
    the channel's end                    <-- exec: the channel closes with it, or carries the error before

If the parent ends before "go" the child reads the end of the channel and leaves. Errors travel as data:
the step, the errno and the exit status Docker has for it. In the child nothing is imported after
`rootfs.enter`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` imports enum: 8 ms
import _socket
import errno
import os
import stat
import sys

from mlenv.container import mounts, namespaces, rootfs, security, syscalls
from mlenv.container.channel import (
    NOT_FOUND,
    Channel,
    as_error,
    expect,
    finish,
    not_executable,
    reported,
    tell,
)
from mlenv.errors import ContainerStartError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from mlenv.container.bundle import Bundle
    from mlenv.container.cgroups import Group
    from mlenv.container.namespaces import IdMap

_EXIT_FAILED = 125
_EXIT_NOT_FOUND = 127
_SIGKILL = 9
INIT_BINARY = os.path.join(os.path.dirname(__file__), "init")
UNSEALED = (
    "mlenv's init was not built on this machine: programs of the container are executed by the host's own"
    " interpreter, and an image made to attack it may overwrite it (install a C compiler and mlenv again)"
)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Started:
    """A container's PID 1 that runs: its host pid, the pty's master where it has one, the map in force."""

    __slots__ = ("id_map", "pid", "terminal_fd")

    def __init__(self, pid: int, terminal_fd: int | None, id_map: IdMap) -> None:
        self.pid = pid
        self.terminal_fd = terminal_fd
        self.id_map = id_map


class Plan:
    """All that is decided before the fork."""

    __slots__ = ("bundle", "group", "id_map", "init", "init_fd", "mounts", "privileges", "problems", "stdio")

    def __init__(self, bundle: Bundle, group: Group, id_map: IdMap, stdio: Sequence[int] = (0, 1, 2)) -> None:
        self.bundle = bundle
        self.group = group
        self.id_map = id_map
        self.stdio = tuple(stdio)
        self.mounts = mounts.read_mounts(bundle.config.get("mounts", ()), bundle.path)
        self.privileges = security.Privileges(bundle.process, bundle.system_call_filter)
        self.init_fd = sealed_init()
        self.problems = [] if self.init_fd is not None else [UNSEALED]
        self.init: Callable[..., NoReturn] | None = None
        if bundle.wants_init and self.init_fd is None:
            from mlenv.container import init

            self.init = init.run


def start(plan: Plan, *, connect: Callable[[int], None] | None = None) -> Started:
    """Start the bundle's process and return once its program has been executed.

    `connect` is called with PID 1's host pid when its network namespace is there and before anything runs
    in it. Raises: ContainerStartError with 125, 126 or 127; whatever `connect` raises. Nothing of the
    child is left then.
    """
    rootfs.prepare_directories(plan.bundle, plan.mounts)
    ours, theirs = Channel.pair()
    pid = -1
    try:
        pid, id_map = _fork(plan, ours, theirs)
        if not plan.group.joins_itself:
            plan.group.join(pid)
        problems = expect(ours, "ready")
        plan.group.problems += problems.splitlines()
        if connect is not None:
            connect(pid)
        ours.send("go")
        terminal_fd = finish(ours)
    except BaseException as error:
        end(pid)
        if isinstance(error, (BrokenPipeError, ConnectionResetError)):
            raise reported(ours) from error
        raise
    finally:
        theirs.close()
        ours.close()
    return Started(pid, terminal_fd, id_map)


def end(pid: int) -> None:
    """Kill and reap a child that may have ended already."""
    if pid > 0:
        try:
            os.kill(pid, _SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return


def _fork(plan: Plan, ours: Channel, theirs: Channel) -> tuple[int, IdMap]:
    """Fork PID 1 of a new pid namespace and return its host pid and the user map in force."""
    if plan.id_map.needs_namespace:
        return _fork_mapped(plan, ours, theirs)
    kinds = plan.bundle.namespaces
    if "pid" not in kinds:
        return _fork_into(plan, ours, theirs), plan.id_map
    own_fd = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if kinds["pid"]:
            namespaces.join("pid", kinds["pid"])
        else:
            syscalls.unshare(syscalls.CLONE_NEWPID)
        try:
            pid = _fork_into(plan, ours, theirs)
        finally:
            syscalls.setns(own_fd, syscalls.CLONE_NEWPID)
    finally:
        os.close(own_fd)
    return pid, plan.id_map


def _fork_into(plan: Plan, ours: Channel, theirs: Channel) -> int:
    pid = os.fork()
    if pid == 0:
        ours.close()
        _run_child(plan, theirs)
    theirs.close()
    return pid


def _fork_mapped(plan: Plan, ours: Channel, theirs: Channel) -> tuple[int, IdMap]:
    """Fork through a middle process that makes the user namespace, has it mapped and starts PID 1 in it."""
    syscalls.set_child_subreaper()
    middle = os.fork()
    if middle == 0:
        ours.close()
        _run_middle(plan, theirs)
    theirs.close()
    try:
        expect(ours, "user")
        id_map = namespaces.write_map(plan.id_map, middle)
        ours.send("mapped", id_map.mode)
        pid = _receive_pid(ours)
    except BaseException:
        end(middle)
        raise
    os.waitpid(middle, 0)
    return pid, id_map


def _receive_pid(channel: Channel) -> int:
    """Return PID 1's host pid, told by the middle process; PID 1 may be quicker to say "ready"."""
    word, text, _ = channel.receive()
    if word == "ready":
        pid = int(expect(channel, "pid"))
        channel.put_back(word, text)
        return pid
    if word != "pid":
        raise as_error(word, text)
    return int(text)


def _run_middle(plan: Plan, channel: Channel) -> NoReturn:
    try:
        try:
            namespaces_path = plan.bundle.namespaces.get("user")
            if namespaces_path:
                namespaces.join("user", namespaces_path)
            else:
                syscalls.unshare(syscalls.CLONE_NEWUSER)
        except OSError as error:
            raise _user_namespace_refused(error) from error
        channel.send("user")
        mode = expect(channel, "mapped")
        if mode != plan.id_map.mode:
            plan.id_map = namespaces.single(os.geteuid(), os.getegid(), "")
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        if "pid" in plan.bundle.namespaces:
            syscalls.unshare(syscalls.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            _run_child(plan, channel)
        channel.send("pid", str(pid))
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - everything is told to the parent
        tell(channel, error)
    os._exit(_EXIT_FAILED)


def _user_namespace_refused(error: OSError) -> ContainerStartError:
    return ContainerStartError(
        "this host lets ordinary users make no user namespace",
        cause=str(error),
        hint="as root: sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=15000"
        " kernel.apparmor_restrict_unprivileged_userns=0",
    )


def _run_child(plan: Plan, channel: Channel) -> NoReturn:
    """Become the container's process; never returns."""
    try:
        _assemble_and_execute(plan, channel)
    except BaseException as error:  # noqa: BLE001 - everything is told to the parent
        tell(channel, error)
    os._exit(_EXIT_FAILED)


def _assemble_and_execute(plan: Plan, channel: Channel) -> None:
    bundle, process = plan.bundle, plan.bundle.process
    os.setsid()
    _own_stdio(plan, channel)
    problems = plan.group.join_self() if plan.group.joins_itself else []
    _enter_namespaces(bundle)
    channel.send("ready", "\n".join(problems))
    root_fd = rootfs.assemble(
        bundle,
        plan.mounts,
        plan.group.members(),
        in_user_namespace=plan.id_map.needs_namespace,
        mapped_gids=plan.id_map.gid_count,
    )
    _name_host(bundle)
    identity = read_identity(bundle, root_fd)
    expect(channel, "go")
    # Not earlier: the helpers of a user's network may not look into a process that hides.
    syscalls.set_dumpable(0)
    if "cgroup" in bundle.namespaces:
        _enter("cgroup", bundle.namespaces["cgroup"])
    if process.get("terminal"):
        channel.send("terminal", "", open_terminal(root_fd, process.get("consoleSize"), console=True))
    _set_kernel_parameters(bundle)
    rootfs.restrict(bundle, root_fd)
    rootfs.enter(root_fd)
    _score_out_of_memory(process.get("oomScoreAdj"))
    execute(
        channel,
        process,
        identity,
        plan.privileges,
        can_set_groups=plan.id_map.mode != "single",
        init_fd=plan.init_fd,
        stays=bundle.wants_init,
        init=plan.init,
        gives_streams=bool(process.get("terminal")) or plan.stdio != (0, 1, 2),
    )


def _own_stdio(plan: Plan, channel: Channel) -> None:
    """Put the container's streams on 0, 1, 2 and close every descriptor that is not needed."""
    copies = [os.dup(descriptor) if descriptor > 2 else descriptor for descriptor in plan.stdio]  # noqa: PLR2004
    if tuple(copies) != (0, 1, 2):
        high = [os.dup(descriptor) for descriptor in copies]
        for target, descriptor in enumerate(high):
            os.dup2(descriptor, target, inheritable=True)
    for descriptor in (0, 1, 2):
        os.set_inheritable(descriptor, True)
    keep_only({channel.socket.fileno()} | ({plan.init_fd} if plan.init_fd is not None else set()))


def keep_only(wanted: set[int]) -> None:
    """Close every descriptor but the standard streams and `wanted`."""
    first = 3
    for descriptor in sorted(wanted):
        if descriptor > first:
            syscalls.close_range(first, descriptor - 1)
        first = descriptor + 1
    syscalls.close_range(first)


def _enter_namespaces(bundle: Bundle) -> None:
    fresh = 0
    for kind, path in bundle.namespaces.items():
        if kind in ("mount", "ipc", "uts", "network"):
            if path:
                namespaces.join(kind, path)
            else:
                fresh |= namespaces.FLAGS[kind]
    if fresh:
        syscalls.unshare(fresh)
    if fresh & syscalls.CLONE_NEWNET:
        namespaces.bring_loopback_up()


def _enter(kind: str, path: str | None) -> None:
    if path:
        namespaces.join(kind, path)
    else:
        syscalls.unshare(namespaces.FLAGS[kind])


def _name_host(bundle: Bundle) -> None:
    if "hostname" in bundle.config:
        _socket.sethostname(bundle.config["hostname"])


def _set_kernel_parameters(bundle: Bundle) -> None:
    for key, value in bundle.linux.get("sysctl", {}).items():
        with open(f"/proc/sys/{key.replace('.', '/')}", "w", encoding="utf-8") as file:
            file.write(value)


def _score_out_of_memory(score: int | None) -> None:
    if score is not None:
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write(str(score))


def read_identity(bundle: Bundle, root_fd: int) -> security.Identity:
    """Return who the process is, by the files in the root where the bundle gives a name."""
    user = bundle.process.get("user", {})
    numbers = f"{user.get('uid', 0)}:{user.get('gid', 0)}"
    name = bundle.annotations.get("dev.mlenv.user")
    passwd = root_file(root_fd, "/etc/passwd")
    identity = security.look_up(name or numbers, passwd, root_file(root_fd, "/etc/group") if name else b"")
    identity.groups += user.get("additionalGids", ())
    return identity


def root_file(root_fd: int, path: str) -> bytes:
    """Return a small file of the root, nothing where there is none."""
    try:
        file_fd = mounts.open_in_root(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # an image without it has no names
        return b""
    with os.fdopen(file_fd, "rb") as file:
        return file.read(1 << 20)


def open_terminal(root_fd: int, size: dict[str, int] | None, *, console: bool) -> int:
    """Make a pty of the container's own devpts our terminal and return its master."""
    import fcntl
    import termios

    from mlenv.container import devices

    unlock, get_number, set_controlling = 0x40045431, 0x80045430, 0x540E
    master_fd = mounts.open_in_root(root_fd, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(master_fd, unlock, bytes(4))
    number = int.from_bytes(fcntl.ioctl(master_fd, get_number, bytes(4)), sys.byteorder)
    slave = f"/dev/pts/{number}"
    slave_fd = mounts.open_in_root(root_fd, slave, os.O_RDWR | os.O_NOCTTY)
    if size:
        window = b"".join(size[key].to_bytes(2, sys.byteorder) for key in ("height", "width")) + bytes(4)
        fcntl.ioctl(master_fd, termios.TIOCSWINSZ, window)
    if console:
        devices.add_console(root_fd, slave)
    for descriptor in (0, 1, 2):
        os.dup2(slave_fd, descriptor, inheritable=True)
    if slave_fd > 2:  # noqa: PLR2004 - the standard streams
        os.close(slave_fd)
    fcntl.ioctl(0, set_controlling, 0)
    return master_fd


def execute(
    channel: Channel,
    process: dict[str, Any],
    identity: security.Identity,
    privileges: security.Privileges,
    *,
    can_set_groups: bool,
    init_fd: int | None,
    stays: bool = False,
    init: Callable[..., NoReturn] | None = None,
    gives_streams: bool = False,
) -> None:
    """Give up what the process shall not have and execute it; returns only by raising.

    `init_fd` is what `sealed_init` returned: it `stays` in front of the program as PID 1, or becomes it.
    `gives_streams` says that the standard streams were made for this process and shall belong to its user.

    Raises: OSError of the call that failed; ContainerStartError for a program that cannot be executed.
    """
    environment = _environment(process, identity)
    if gives_streams:
        _give_streams(identity.uid)
    security.become(
        identity, privileges, can_set_groups=can_set_groups, umask=process.get("user", {}).get("umask")
    )
    _change_directory(process["cwd"])
    _reset_signals()
    arguments = process["args"]
    program = find_program(arguments[0], environment.get("PATH", DEFAULT_PATH))
    syscalls.set_parent_death_signal(_SIGKILL)  # a parent that is gone already shows at the next message
    if init_fd is not None:
        words = ["mlenv-init" if stays else "mlenv-exec", str(channel.socket.fileno()), program, *arguments]
        _execute_sealed(init_fd, channel, words, environment)
    channel.send("exec")
    if init is not None:

        def fail(error: OSError) -> None:
            tell(channel, not_executable(program, error))

        init(program, arguments, environment, channel_fd=channel.socket.fileno(), fail=fail)
    try:
        os.execve(program, arguments, environment)
    except OSError as error:
        raise not_executable(program, error) from error


def _give_streams(uid: int) -> None:
    """Make pipes and terminal the user's own, so that /dev/stdout and the like can be opened again."""
    for descriptor in (0, 1, 2):
        found = os.fstat(descriptor)
        if found.st_uid == uid or not (stat.S_ISFIFO(found.st_mode) or os.isatty(descriptor)):
            continue
        try:
            os.fchown(descriptor, uid, -1)
        except OSError as error:  # an id that is not mapped: where the user's own is not, setresuid says so
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise


def _environment(process: dict[str, Any], identity: security.Identity) -> dict[str, str]:
    environment = dict(entry.split("=", 1) for entry in process.get("env", ()))
    if "HOME" not in environment:
        environment["HOME"] = identity.home or "/"
    if process.get("terminal"):
        environment.setdefault("TERM", "xterm")
    return environment


def _change_directory(path: str) -> None:
    try:
        os.chdir(path)
    except OSError as error:
        raise ContainerStartError(
            f"cannot enter the working directory `{path}`", cause=error.strerror or str(error)
        ) from error


def _reset_signals() -> None:
    """Give the program default signals and none blocked; Python ignores two of them."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    for number in range(1, _signal.NSIG):
        if _signal.getsignal(number) is not _signal.SIG_DFL:
            try:
                _signal.signal(number, _signal.SIG_DFL)
            except (OSError, ValueError):  # KILL, STOP and the C library's own
                continue


def find_program(name: str, path: str) -> str:
    """Return the file that execvp would run. Raises: ContainerStartError 127 or 126."""
    if "/" in name:
        return name
    denied: OSError | None = None
    for directory in path.split(":"):
        candidate = f"{directory or '.'}/{name}"
        try:
            mode = os.stat(candidate).st_mode
        except OSError as error:
            if error.errno not in NOT_FOUND:
                denied = error
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        denied = PermissionError(errno.EACCES, "it is no executable file", candidate)
    if denied is not None:
        raise not_executable(name, denied)
    raise ContainerStartError(
        f"the container has no program `{name}`", cause=f"it is in none of {path}", status=_EXIT_NOT_FOUND
    )


def sealed_init() -> int | None:
    """Return mlenv's static init in a sealed memory file, or None where it was not built.

    What a container executes comes from there and from no file of the host, so that nothing of the host can
    be overwritten through /proc/PID/exe or an image's `#!/proc/self/exe`. Source: CVE-2019-5736.
    """
    try:
        source_fd = os.open(INIT_BINARY, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    memory_fd = os.memfd_create("mlenv-init", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.sendfile(memory_fd, source_fd, 0, os.fstat(source_fd).st_size)
    finally:
        os.close(source_fd)
    syscalls.seal(memory_fd)
    return memory_fd


def _execute_sealed(
    init_fd: int, channel: Channel, words: list[str], environment: dict[str, str]
) -> NoReturn:
    """Execute the static init, which reports a program that cannot be executed through the channel."""
    os.set_inheritable(channel.socket.fileno(), True)
    channel.send("exec")
    os.execve(init_fd, words, environment)


def hold_signals(numbers: Sequence[int]) -> None:
    """Keep signals back until `pass_signals`: none is lost, and none ends us half-way."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, numbers)


def pass_signals(numbers: Sequence[int], pid: int) -> None:
    """Pass signals on to `pid` from now on, those that were held back first."""

    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    for number in numbers:
        _signal.signal(number, forward)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, numbers)


def load_terminal() -> None:
    """Import what `open_terminal` needs, while the host's files can still be read."""
    import fcntl  # noqa: F401
    import termios  # noqa: F401

    from mlenv.container import devices  # noqa: F401


def exit_status(wait_status: int) -> int:
    """Return the status a shell would show: 128 + the signal's number for a killed process."""
    if os.WIFSIGNALED(wait_status):
        return 128 + os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)
