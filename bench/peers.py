"""The programs mlenv is measured beside, where they are installed: how each is started on its own state."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from measure import UnusableError, call

HYBRID = Path("/sys/fs/cgroup/unified")
"""Where systemd mounts the second hierarchy beside version 1."""


def enter_private_mounts() -> str | None:
    """Leave the machine's mount namespace and hide a hybrid cgroup tree, which crun refuses; return a note.

    Everything that is measured sees the same tree, mlenv too. The machine's own mounts stay as they are.
    """
    controllers = HYBRID / "cgroup.controllers"
    if os.geteuid() != 0 or not controllers.exists() or not controllers.read_text().strip():
        return None
    _unshare_mounts()
    call("mount", "--make-rprivate", "/")
    call("umount", str(HYBRID))
    return "the v2 half of this machine's hybrid cgroup tree was hidden from all rows: crun refuses it"


def _unshare_mounts() -> None:
    import ctypes

    clone_newns = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newns) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNS)")


NEEDS_BUILDX = 23
"""The first version of the client that cannot drive BuildKit without the buildx plug-in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Docker:
    """A Docker daemon of our own, and the client that can drive it. `pid` is the daemon's."""

    client: str
    socket: Path
    data: Path
    pid: int

    @property
    def env(self) -> dict[str, str]:
        """The environment in which the client finds this daemon, with BuildKit on."""
        return {**os.environ, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "1"}

    def call(self, *args: str | Path, stdin: bytes | None = None) -> str:
        """Run the client."""
        return call(self.client, *args, env=self.env, stdin=stdin)

    def enter_network(self) -> list[str]:
        """Return the command prefix that runs something in the daemon's network namespace."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net"]


@contextmanager
def docker_daemon(root: Path) -> Iterator[Docker]:
    """Run dockerd with its state under `root`, in namespaces of its own, until the block ends.

    Raises: UnusableError where there is no dockerd, no client with BuildKit, or it does not come up.
    """
    if shutil.which("dockerd") is None or os.geteuid() != 0:
        raise UnusableError("no dockerd, or not root")
    client = _client_with_buildkit()
    root.mkdir(parents=True)
    socket = root / "docker.sock"
    start = (
        "ip link set lo up; exec dockerd --data-root=$0/data --exec-root=$0/exec --host=unix://$0/docker.sock"
        " --pidfile=$0/pid >$0/log 2>&1"
    )
    process = subprocess.Popen(
        ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", start, str(root)]
    )
    try:
        docker = Docker(client=client, socket=socket, data=root / "data", pid=process.pid)
        _wait_until_up(docker, process, root / "log")
        yield docker
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_until_up(docker: Docker, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            docker.call("version")
        except UnusableError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text().strip().splitlines()[-1:]
                raise UnusableError(f"dockerd did not come up: {last or error}") from error
            time.sleep(0.1)
        else:
            return


def _client_with_buildkit() -> str:
    """Return a docker client on PATH that builds with BuildKit: one before 23, or one with buildx."""
    found = [Path(folder) / "docker" for folder in os.environ["PATH"].split(os.pathsep)]
    for client in dict.fromkeys(map(str, found)):
        if not os.access(client, os.X_OK):
            continue
        version = call(client, "--version").split("version ")[1]
        if int(version.split(".")[0]) < NEEDS_BUILDX or _succeeds(client, "buildx", "version"):
            return client
    raise UnusableError("no docker client with BuildKit on PATH")


def _succeeds(*args: str) -> bool:
    try:
        call(*args)
    except UnusableError:
        return False
    return True


def version(*args: str) -> str:
    """Return the first line of what a program says of its version, or that it is not installed."""
    if shutil.which(args[0]) is None:
        return "not installed"
    return (call(*args).strip().splitlines() or ["?"])[0]


def low_limits() -> list[str]:
    """Return podman's options for limits that any root may set: it asks for a million of each by itself."""
    return ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"]


def podman(root: Path) -> Sequence[str]:
    """Return the podman command on its own state; root may lack the right to raise limits, so they stay."""
    state = [f"--root={root}/data", f"--runroot={root}/run", f"--tmpdir={root}/tmp"]
    return ["podman", *state, "--cgroup-manager=cgroupfs", "--events-backend=none"]
