"""Whoever is killed, whichever system call fails: nothing is left, the next command sees a clean state."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from containers import CORE
from requires import requires

from mlenv.container import config, lifecycle, state
from mlenv.errors import ContainerStartError

pytestmark = requires("root", "overlay")

DEADLINE = 20.0

RUN = """
import json, sys
from mlenv.container import lifecycle
container = lifecycle.create(json.loads(sys.argv[1]), name="victim")
print("created", flush=True)
lifecycle.start(container, attached=True)
print("started", flush=True)
sys.exit(lifecycle.attach(container, stdin=False))
"""


@pytest.fixture
def made(busybox_rootfs: Path) -> dict[str, Any]:
    script = "echo running; sleep 1000"
    return config.runtime_config(
        args=["sh", "-c", script], env={"PATH": "/bin"}, layers=[busybox_rootfs], network="none"
    )


@pytest.fixture(autouse=True)
def removed(home: Path) -> Iterator[None]:
    yield
    for container in lifecycle.containers():
        lifecycle.remove(container, force=True)
    assert list((home / "containers").glob("*/")) == []


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        select.select([], [], [], 0.01)


def alive(pid: int) -> bool:
    return state.start_time(pid) is not None


def started(made: dict[str, Any]) -> lifecycle.Container:
    container = lifecycle.create(made, name="victim")
    lifecycle.start(container)
    return container


def test_the_shim_is_killed(made: dict[str, Any]) -> None:
    """The container ends with it; the next look says so and clears its groups, socket and state."""
    container = started(made)
    known = state.read(str(container.bundle))
    os.kill(known["shim"]["pid"], signal.SIGKILL)
    until(lambda: not alive(known["init"]["pid"]))
    found = lifecycle.find("victim")
    assert (found.status, found.exit_code, found.warnings) == (
        lifecycle.Status.STOPPED, 137, ("the container's shim was killed",),
    )  # fmt: skip
    assert not Path(known["socket"]).exists()
    assert not any(Path(group).exists() for group in known["cgroup"]["directories"].values())


def test_the_shim_is_killed_while_someone_is_attached(made: dict[str, Any]) -> None:
    with subprocess.Popen([sys.executable, "-c", RUN, json.dumps(made)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as command:  # fmt: skip
        assert command.stdout is not None
        assert command.stderr is not None
        assert [command.stdout.readline() for _ in range(3)] == [b"created\n", b"started\n", b"running\n"]
        os.kill(state.read(str(lifecycle.find("victim").bundle))["shim"]["pid"], signal.SIGKILL)
        assert command.wait(10) == 1
        assert b"the connection to the container was lost" in command.stderr.read()


def test_a_container_that_was_orphaned_can_be_started_again(made: dict[str, Any]) -> None:
    container = started(made)
    shim = state.read(str(container.bundle))["shim"]["pid"]
    os.kill(shim, signal.SIGKILL)
    until(lambda: not alive(shim))
    lifecycle.start(container)
    assert lifecycle.find("victim").status.is_running


def test_pid_1_is_killed(made: dict[str, Any]) -> None:
    container = started(made)
    assert container.pid is not None
    os.kill(container.pid, signal.SIGKILL)
    assert lifecycle.wait(container) == 137
    assert lifecycle.find("victim").status is lifecycle.Status.STOPPED


def test_the_command_is_killed_after_the_start(made: dict[str, Any]) -> None:
    """The shim is the parent: the container runs on."""
    with subprocess.Popen([sys.executable, "-c", RUN, json.dumps(made)], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert [command.stdout.readline() for _ in range(3)] == [b"created\n", b"started\n", b"running\n"]
        command.kill()
    assert lifecycle.find("victim").status.is_running


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1])
def test_the_command_is_killed_in_the_middle_of_a_start(made: dict[str, Any], delay: float) -> None:
    """Either it runs, or nothing does; nothing hangs in between."""
    with subprocess.Popen([sys.executable, "-c", RUN, json.dumps(made)], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"created\n"
        select.select([], [], [], delay)
        command.kill()
    directory = lifecycle.find("victim").bundle

    def settled() -> bool:
        known = state.read(str(directory))
        return known["status"] == "running" or not (known.get("shim") or _shims(directory))

    def consistent() -> bool:
        """A container that was running for a moment, before its shim saw that nobody waits for it, goes."""
        found = lifecycle.find("victim")
        if found.status.is_running:
            return found.pid is not None and alive(found.pid)
        return state.read(str(directory)).get("init") is None

    until(settled)
    until(consistent)


def _shims(directory: Path) -> list[str]:
    return [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and str(directory).encode() in _words(entry)
        and entry.name != str(os.getpid())
    ]


def _words(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def foreground(home: Path, made: dict[str, Any]) -> list[str]:
    bundle = home / "bundle"
    (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(made))
    return [sys.executable, "-I", "-S", str(CORE), "run", "--bundle", str(bundle), f"fault-{os.getpid()}"]


def test_a_core_in_the_foreground_is_killed(home: Path, made: dict[str, Any]) -> None:
    """The container dies with it; what it noted is cleared by whoever looks next."""
    with subprocess.Popen(foreground(home, made), stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"running\n"
        noted = state.read(str(next((home / "run" / "foreground").iterdir())))
        command.kill()
    until(lambda: not alive(noted["init"]["pid"]))
    assert lifecycle.containers() == []
    assert not any(Path(group).exists() for group in noted["cgroup"]["directories"].values())


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06])
def test_a_core_is_killed_at_any_moment(home: Path, made: dict[str, Any], delay: float) -> None:
    with subprocess.Popen(foreground(home, made), stdout=subprocess.DEVNULL) as command:
        select.select([], [], [], delay)
        command.kill()
    lifecycle.containers()


CLAIMS = """
import os, sys
from mlenv.container import foreground
for number in range(int(sys.argv[2])):
    foreground._release(foreground._claim(sys.argv[1], f"step-{os.getpid()}"))
"""
SWEEPS = """
import sys
from mlenv.container import lifecycle
for number in range(int(sys.argv[1])):
    lifecycle.containers()
"""


def test_listings_and_build_steps_leave_each_other_alone(home: Path) -> None:
    """A step's directory comes and goes whole; no look at it takes it for a dead one's."""
    claims = [[sys.executable, "-c", CLAIMS, str(home / "run"), "400"]] * 2
    sweeps = [[sys.executable, "-c", SWEEPS, "400"]] * 2
    running = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for words in claims + sweeps]
    assert [process.communicate(timeout=60)[1] for process in running] == ["", "", "", ""]
    assert list((home / "run" / "foreground").iterdir()) == []


def test_drafts_of_dead_processes_only_are_swept(home: Path) -> None:
    folder = home / "run" / "foreground"
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    ours, theirs = folder / f"step.{os.getpid()}.gone", folder / f"step.{dead.pid}.gone"
    for draft in (ours, theirs):
        draft.mkdir(parents=True)
        (draft / "lock").touch()
    lifecycle.containers()
    assert list(folder.iterdir()) == [ours]
    (ours / "lock").unlink()
    ours.rmdir()


def test_the_id_of_a_killed_container_can_be_used_again(home: Path, made: dict[str, Any]) -> None:
    """What it left is undone first; while it runs its id is taken."""
    with subprocess.Popen(foreground(home, made), stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"running\n"
        noted = state.read(str(next((home / "run" / "foreground").iterdir())))
        twice = subprocess.run(foreground(home, made), capture_output=True, text=True, check=False)
        assert (twice.returncode, "is running" in twice.stderr) == (125, True)
        command.kill()
    until(lambda: not alive(noted["init"]["pid"]))
    made["process"]["args"] = ["true"]
    assert subprocess.run(foreground(home, made), check=False).returncode == 0
    assert list((home / "run" / "foreground").iterdir()) == []


FAILING = (
    ("unshare", 1, "EPERM"),
    ("unshare", 2, "ENOSPC"),
    ("mount_setattr", 1, "EPERM"),
    ("fsopen", 1, "ENODEV"),
    ("fsopen", 2, "EPERM"),
    ("fsconfig", 2, "EINVAL"),
    ("fsmount", 1, "EBUSY"),
    ("fsmount", 4, "ENOMEM"),
    ("move_mount", 1, "EINVAL"),
    ("move_mount", 5, "ELOOP"),
    ("open_tree", 1, "EPERM"),
    ("openat2", 3, "EAGAIN"),
    ("mknodat", 1, "EPERM"),
    ("symlinkat", 1, "ENOSPC"),
    ("pivot_root", 1, "EINVAL"),
    ("umount2", 1, "EINVAL"),
    ("capset", 1, "EPERM"),
    ("setresuid", 1, "EAGAIN"),
    ("setgroups", 1, "EPERM"),
    ("memfd_create", 1, "ENOMEM"),
    ("sethostname", 1, "EPERM"),
)


@requires("strace")
@pytest.mark.parametrize(("call", "when", "error"), FAILING)
def test_a_system_call_fails(home: Path, made: dict[str, Any], call: str, when: int, error: str) -> None:
    """125, a message with the call's error, and nothing left (the leak check says)."""
    import errno

    made["process"]["args"] = ["true"]
    inject = f"inject={call}:error={error}:when={when}"
    command = ["strace", "-f", "-qq", "-o", str(home / "trace"), "-e", f"trace={call}", "-e", inject]
    done = subprocess.run(
        [*command, *foreground(home, made)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "(INJECTED)" in (home / "trace").read_text()
    assert done.returncode == 125, done.stderr
    assert os.strerror(getattr(errno, error)) in done.stderr
    assert "Traceback" not in done.stderr
    lifecycle.containers()


def fill(disk: Path) -> None:
    """Write until there is no room left."""
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0


def test_a_full_disk_while_starting(home: Path, made: dict[str, Any]) -> None:
    """The state cannot be written: 125 and nothing half-made."""
    container = lifecycle.create(made, name="victim")
    small = container.bundle
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        container.bundle.joinpath("rootfs").mkdir()
        (small / "config.json").write_text(json.dumps(container.config))
        state.write(str(small), {"id": container.id, "name": "victim", "status": "created", "created": 0.0})
        fill(small)
        with pytest.raises(ContainerStartError) as raised:
            lifecycle.start(container)
        assert raised.value.exit_status == 125
        assert "No space left on device" in str(raised.value)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_disk_filled_while_running(home: Path, made: dict[str, Any]) -> None:
    """The container gets ENOSPC, its log loses lines, and its end is still written down."""
    made["process"]["args"] = ["sh", "-c", "while :; do usleep 10000; [ -e /go ] && exit 6; done"]
    container = lifecycle.create(made, name="victim")
    disk = container.bundle
    kept = {name: (disk / name).read_bytes() for name in ("config.json", "state.json")}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    try:
        disk.joinpath("rootfs").mkdir()
        for name, content in kept.items():
            (disk / name).write_bytes(content)
        lifecycle.start(container)
        (disk / "upper" / "go").touch()
        fill(disk)
        assert lifecycle.wait(container) == 6
        assert lifecycle.find("victim").exit_code == 6
    finally:
        lifecycle.stop(container, timeout=0)
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_layer_is_named(home: Path, made: dict[str, Any]) -> None:
    layers = json.loads(made["annotations"]["dev.mlenv.layers"])
    missing = str(home / "gone")
    made["annotations"]["dev.mlenv.layers"] = json.dumps([*layers, missing])
    container = lifecycle.create(made, name="victim")
    with pytest.raises(ContainerStartError, match="cannot be started") as raised:
        lifecycle.start(container)
    assert missing in str(raised.value)
