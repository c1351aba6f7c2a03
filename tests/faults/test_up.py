"""`mlenv up` and `mlenv build` interrupted and killed at every step: undone or resumed, never half-made."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEADLINE = 240.0


def command(home: Path, *words: str) -> list[str]:
    del home
    return [sys.executable, "-m", "mlenv", *words]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "MLENV_HOME": str(home), "NO_COLOR": "1"}


def run(home: Path, *words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(home, *words),
        env=environment(home),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


@contextlib.contextmanager
def started(home: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(home, *words),
        env=environment(home),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def lines_until(process: subprocess.Popen[str], count: int) -> list[str]:
    """Read `count` lines of stderr, or fewer where the command says no more."""
    assert process.stderr is not None
    lines = []
    while len(lines) < count and (line := process.stderr.readline()):
        lines.append(line)
    return lines


def state(home: Path) -> dict[str, object]:
    """What `up` leaves for people to see: containers, kernelspecs, a server."""
    containers = json.loads(run(home, "ps", "-a", "--json").stdout)["containers"]
    kernels = json.loads(run(home, "kernel", "list", "--json").stdout)["kernels"]
    return {"containers": [c["name"] for c in containers], "kernels": kernels, "servers": servers(home)}


def servers(home: Path) -> list[int]:
    """The pids of JupyterLab servers of this home: processes that have its MLENV_HOME and run jupyter."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes()
            variables = (entry / "environ").read_bytes().split(b"\0")
            if b"jupyter" in line and f"MLENV_HOME={home}".encode() in variables:
                found.append(int(entry.name))
    return found


def wait_until(condition: object, what: str, deadline: float = 30.0) -> None:
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.05)
    pytest.fail(f"not within {deadline} s: {what}")


@pytest.mark.requires("userns", "overlay")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_ctrl_c_takes_everything_back(built_home, step):
    with started(built_home, "up", "quickstart", "--no-browser") as process:
        lines = lines_until(process, step)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        _, rest = process.communicate(timeout=DEADLINE)
    try:
        if process.returncode == 0:  # it was done before the signal arrived
            assert "quickstart is up" in "".join(lines) + rest
            return
        assert process.returncode == 130, "".join(lines) + rest
        assert "Traceback" not in rest
        assert state(built_home) == {"containers": [], "kernels": [], "servers": []}
    finally:
        run(built_home, "down", "--all")


@pytest.mark.requires("userns", "overlay")
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_up_is_resumed_by_the_next(built_home, step):
    with started(built_home, "up", "quickstart", "--no-browser") as process:
        lines_until(process, step)
        process.kill()
        process.wait()
    try:
        again = run(built_home, "up", "quickstart", "--no-browser", "--json")
        assert again.returncode == 0, again.stderr
        now = state(built_home)
        assert now["containers"] == ["quickstart"]
        assert len(servers(built_home)) >= 1
    finally:
        run(built_home, "down", "--all")
    wait_until(lambda: not servers(built_home), "the server has ended")
    assert state(built_home) == {"containers": [], "kernels": [], "servers": []}


@pytest.mark.requires("userns", "overlay", "index", "mirror")
def test_a_build_killed_at_every_step_resumes_to_the_same_image(built_home, tmp_path):
    """Each kill loses only the step it hit: builds go on from what is finished, to the same digest."""
    expected = run(built_home, "build", "quickstart").stdout
    home = tmp_path / "home"
    for step in range(1, 40):
        with started(home, "build", "quickstart") as process:
            lines = lines_until(process, step)
            if len(lines) < step:
                out, _ = process.communicate(timeout=DEADLINE)
                assert process.returncode == 0
                assert out == expected
                break
            process.kill()
            process.wait()
        images = json.loads(run(home, "images", "--json").stdout)["images"]
        assert images in ([], [image for image in images if image["digest"] == expected.strip()])
    else:
        pytest.fail("the build never came to its end")
    assert not list((home / "store" / "tmp").iterdir())


@pytest.mark.requires("userns", "overlay")
def test_a_taken_default_port_gives_the_next_free_one(built_home):
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else may hold it already: as good
            holder.bind(("127.0.0.1", 8888))
            holder.listen()
        try:
            done = run(built_home, "up", "quickstart", "--no-browser")
            assert done.returncode == 0, done.stderr
            assert "port 8888 is taken" in done.stderr
            assert ":8888/" not in done.stdout
            assert "token=" in done.stdout
        finally:
            run(built_home, "down", "--all")


@pytest.mark.requires("userns", "overlay")
def test_a_taken_port_that_was_asked_for_is_an_error_and_nothing_stays(built_home):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = run(built_home, "up", "quickstart", "--no-browser", "--port", str(port))
    assert done.returncode != 0
    assert f"port {port}" in done.stderr
    assert state(built_home) == {"containers": [], "kernels": [], "servers": []}


@pytest.mark.requires("userns", "overlay")
def test_down_of_what_is_not_up_is_an_error(built_home):
    done = run(built_home, "down", "nothing-of-this-name")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error[not-up]: the environment `nothing-of-this-name` is not up")


@pytest.mark.requires("userns", "overlay", "index", "mirror")
@pytest.mark.parametrize("megabytes", [24, 120])
def test_a_full_disk_is_said_and_nothing_half_made_stays(tmp_path, megabytes):
    """The disk fills while fetching or unpacking: the error says so, and only whole trees are kept."""
    home = tmp_path / "home"
    home.mkdir()
    script = (
        f'mount -t tmpfs -o size={megabytes}m tmpfs "$MLENV_HOME" && "$@"; s=$?; cd "$MLENV_HOME/store"; '
        "find tmp images -mindepth 1; for tree in trees/*/*/*; do "
        '[ ! -e "$tree" ] || [ -e "$tree/meta.json" ] || echo "$tree"; done; exit $s'
    )
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    done = subprocess.run(
        ["unshare", *as_root, "--mount", "sh", "-c", script, "sh", *command(home, "build", "quickstart")],
        env=environment(home),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "No space left" in done.stderr
    assert "hint: free some disk space" in done.stderr
    assert "Traceback" not in done.stderr
