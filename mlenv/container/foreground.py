"""A container in the foreground, without a shim: it inherits our streams, and we end with its status.

While it runs its state lies below the root directory, so that whoever comes next can clean up after a SIGKILL.
"""

from __future__ import annotations

import _signal
import os

from mlenv.container import bundle as bundles
from mlenv.container import cgroups, namespaces, process, state
from mlenv.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mlenv.container.bundle import Bundle
    from mlenv.container.net import NetState

FOREGROUND = "foreground"
"""Directory below the root that holds the states of containers without a shim."""
_FORWARDED = (
    _signal.SIGHUP,
    _signal.SIGINT,
    _signal.SIGQUIT,
    _signal.SIGTERM,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGWINCH,
)
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-+")


def default_root() -> str:
    """Return where live state goes when no `--root` is given; the same as `paths.run_dir`."""
    moved = os.environ.get("MLENV_HOME")
    if moved:
        return os.path.join(os.path.abspath(moved), "run")
    if os.geteuid() == 0:
        return "/run/mlenv"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.access(runtime, os.W_OK | os.X_OK):
        return os.path.join(runtime, "mlenv")
    return f"/tmp/mlenv-{os.getuid()}/mlenv"  # noqa: S108 - made with mode 0700 below, refused if another's


def run(*, bundle: str, container_id: str, root: str | None = None) -> int:
    """Run the bundle's process to its end and return its exit status.

    Raises: ContainerError; ContainerStartError with 125, 126 or 127.
    """
    if not container_id or container_id.startswith(".") or not _ID_CHARACTERS.issuperset(container_id):
        raise ContainerError(f"`{container_id}` is no container id", hint="use letters, digits and _ . - +")
    loaded = bundles.read(bundle)
    if loaded.ports:
        raise ContainerError("a container without a shim cannot publish ports", hint="start it with `mlenv run -d`")
    directory = _claim(root or default_root(), container_id)
    try:
        return _run(loaded, container_id, directory)
    finally:
        _release(directory)


def _claim(root: str, container_id: str) -> str:
    directory = os.path.join(root, FOREGROUND, container_id)
    os.makedirs(directory, 0o700, exist_ok=True)
    if os.stat(directory).st_uid != os.geteuid():
        raise ContainerError(f"`{directory}` belongs to someone else", hint="give --root a directory of yours")
    if state.lock(directory, wait=False) is None:
        raise ContainerError(f"a container `{container_id}` is running", hint="give another id")
    return directory


def _release(directory: str) -> None:
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    os.rmdir(directory)


def _run(bundle: Bundle, container_id: str, directory: str) -> int:
    id_map = namespaces.plan(bundle.linux)
    group = cgroups.create(container_id, bundle.linux.get("resources", {}), path=bundle.linux.get("cgroupsPath"))
    known = {
        "id": container_id,
        "bundle": bundle.path,
        "owner": state.identity(os.getpid()),
        "cgroup": {"version": group.version, "directories": group.directories},
    }
    network: list[NetState] = []

    def connect(pid: int) -> None:
        state.write(directory, {**known, "init": state.identity(pid)})
        if bundle.network == "private":
            network.append(_connect(container_id, pid, id_map.needs_namespace, directory))

    try:
        write_names(bundle, container_id)
        started = process.start(process.Plan(bundle, group, id_map), connect=connect)
        for problem in group.problems:
            os.write(2, f"warning: {problem}\n".encode())
        return _wait(started)
    finally:
        _clean_up(group, network)


def _connect(container_id: str, pid: int, rootless: bool, directory: str) -> NetState:  # noqa: FBT001
    from mlenv.container import net  # noqa: PLC0415 - most runs need no network of their own

    return net.setup("private", container_id, pid, rootless=rootless, state_dir=directory)


def _clean_up(group: cgroups.Group, network: list[NetState]) -> None:
    if network:
        from mlenv.container import net  # noqa: PLC0415

        net.teardown(network[0])
    group.kill()
    held = group.remove()
    if held:
        os.write(2, f"warning: control groups stay behind: {'; '.join(held)}\n".encode())


def write_names(bundle: Bundle, container_id: str) -> None:
    """Write the hosts, hostname and resolv.conf that the container sees, into the bundle."""
    if not bundle.writes_names:
        return
    hostname = bundle.config.get("hostname") or container_id[:12]
    bundle.config["hostname"] = hostname
    files = {
        "hostname": f"{hostname}\n".encode(),
        "hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n127.0.1.1\t{hostname}\n".encode(),
        "resolv.conf": _resolv_conf(bundle.network),
    }
    for name, content in files.items():
        path = os.path.join(bundle.path, name)
        file_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.write(file_fd, content)
        finally:
            os.close(file_fd)


def _resolv_conf(network: str) -> bytes:
    if network == "private":
        from mlenv.container import net  # noqa: PLC0415

        return net.resolv_conf(network)
    if network == "none":
        return b""
    try:
        with open("/etc/resolv.conf", "rb") as file:  # noqa: PTH123
            return file.read()
    except FileNotFoundError:
        return b""


def _wait(started: process.Started) -> int:
    """Pass signals on until the process ends, and return its exit status."""
    _forward_signals(started.pid)
    _, status = os.waitpid(started.pid, 0)
    return process.exit_status(status)


def _forward_signals(pid: int) -> None:
    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    for number in _FORWARDED:
        _signal.signal(number, forward)


