"""What a container executes, from which file, with whose streams, and what is told about it."""

from __future__ import annotations

import os
import pty
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from containers import REPOSITORY
from requires import requires

from mlenv.container import config, launching, lifecycle, process, state

pytestmark = requires("root", "overlay")
BY_INIT = ["/self", "/bin/echo", "echo", "the sealed init"]
"""A program `#!/proc/self/exe` with the words that make mlenv's init run `echo`; an interpreter cannot."""


@pytest.fixture
def layers(busybox_rootfs: Path, tmp_path: Path) -> list[Path]:
    program = tmp_path / "layer" / "self"
    program.parent.mkdir()
    program.write_text("#!/proc/self/exe\n")
    program.chmod(0o755)
    return [busybox_rootfs, program.parent]


@pytest.fixture(autouse=True)
def removed(home: Path) -> Iterator[None]:
    yield
    for container in lifecycle.containers():
        lifecycle.remove(container, force=True)


@pytest.fixture
def built() -> None:
    if not Path(process.INIT_BINARY).exists():
        pytest.skip("needs cc: mlenv's init was not built")


def started(layers: list[Path], *args: str, **options: Any) -> lifecycle.Container:
    made = config.runtime_config(args=args, env={"PATH": "/bin"}, layers=layers, network="none", **options)
    container = lifecycle.create(made)
    lifecycle.start(container)
    return container


def logged(container: lifecycle.Container) -> str:
    lifecycle.wait(container)
    return b"".join(data for _, data in lifecycle.logs(container)).decode()


def executed(argv: list[str]) -> tuple[int, str, str]:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.usefixtures("built")
class TestNoFileOfTheHostIsExecuted:
    """CVE-2019-5736: `/proc/self/exe` of a process on its way into a program of the image."""

    def test_by_exec(self, layers: list[Path]) -> None:
        container = started(layers, "sleep", "1000")
        argv = launching.exec_command(container, BY_INIT)
        assert executed(argv) == (0, "the sealed init\n", "")

    def test_by_exec_as_a_user(self, layers: list[Path]) -> None:
        container = started(layers, "sleep", "1000")
        argv = launching.exec_command(container, BY_INIT, user="7:8")
        assert executed(argv) == (0, "the sealed init\n", "")

    @pytest.mark.parametrize("init", [True, False])
    def test_by_the_first_process(self, layers: list[Path], *, init: bool) -> None:
        assert logged(started(layers, *BY_INIT, init=init)) == "the sealed init\n"

    def test_the_program_itself_is_the_process(self, layers: list[Path]) -> None:
        """Without an init in front PID 1 is the program, and `exec`'s pid is its own."""
        assert logged(started(layers, "cat", "/proc/1/comm", init=False)) == "cat\n"
        container = started(layers, "sleep", "1000")
        read_fd, write_fd = os.pipe()
        argv = launching.exec_command(container, ["sleep", "999"], pid_fd=write_fd)
        with subprocess.Popen(argv, pass_fds=(write_fd,)) as core:
            os.close(write_fd)
            pid = int(os.read(read_fd, 32))
            os.close(read_fd)
            assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x00999\x00"
            assert sorted(link.name for link in Path(f"/proc/{pid}/fd").iterdir()) == ["0", "1", "2"]
            core.terminate()


def test_without_the_built_init_it_is_said(layers: list[Path], home: Path) -> None:
    package = home / "copy" / "mlenv"
    shutil.copytree(REPOSITORY / "mlenv", package, ignore=shutil.ignore_patterns("init", "__pycache__"))
    container = started(layers, "sleep", "1000")
    argv = launching.exec_command(container, ["true"])
    argv[argv.index("exec") - 1] = str(package / "container" / "__main__.py")
    assert executed(argv) == (0, "", f"warning: {process.UNSEALED}\n")
    script = (
        "from mlenv.container import config, lifecycle; from pathlib import Path; import sys;"
        "c = lifecycle.create(config.runtime_config(args=['/bin/true'], env={}, layers=[Path(sys.argv[1])],"
        " network='none')); lifecycle.start(c); lifecycle.wait(c);"
        "print(*lifecycle.find(c.id).warnings, sep='\\n')"
    )
    command = [sys.executable, "-c", script, str(layers[0])]
    done = subprocess.run(
        command, cwd=home, env={**os.environ, "PYTHONPATH": str(package.parent)}, capture_output=True,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert process.UNSEALED in done.stdout.splitlines(), done.stderr


def test_the_streams_belong_to_the_container_s_user(layers: list[Path]) -> None:
    script = "echo out > /dev/stdout; echo err > /dev/stderr"
    assert sorted(logged(started(layers, "sh", "-c", script, user="7:8")).split()) == ["err", "out"]


def test_the_terminal_belongs_to_the_user_who_executes(layers: list[Path]) -> None:
    container = started(layers, "sleep", "1000")
    argv = launching.exec_command(
        container, ["sh", "-c", "echo written > $(tty); stat -c %u $(tty)"], user="7:8", terminal=True
    )
    pid, master_fd = pty.fork()
    if pid == 0:
        os.execv(argv[0], argv)  # noqa: S606 - it becomes the child of the terminal
    seen = b""
    try:
        while chunk := os.read(master_fd, 4096):
            seen += chunk
    except OSError:  # EIO: the terminal's last user has closed it
        pass
    os.close(master_fd)
    os.waitpid(pid, 0)
    assert seen == b"written\r\n7\r\n"


def test_a_stream_of_the_caller_s_stays_the_caller_s(layers: list[Path], tmp_path: Path) -> None:
    container = started(layers, "sleep", "1000")
    output = tmp_path / "output"
    read_fd, write_fd = os.pipe()
    with output.open("wb") as file:
        argv = launching.exec_command(container, ["true"], user="7:8")
        assert subprocess.run(argv, stdout=file, stderr=write_fd, check=False).returncode == 0
    assert (output.stat().st_uid, os.fstat(write_fd).st_uid) == (os.geteuid(), os.geteuid())
    os.close(read_fd)
    os.close(write_fd)


def test_a_group_that_cannot_be_joined_is_told(layers: list[Path]) -> None:
    container = started(layers, "sleep", "1000")
    known = state.read(str(container.bundle))
    gone = "/sys/fs/cgroup/mlenv-no-such-group"
    known["cgroup"]["directories"]["none"] = gone
    state.write(str(container.bundle), known)
    status, _, told = executed(launching.exec_command(container, ["true"]))
    assert (status, told) == (0, f"warning: {gone}: No such file or directory\n")


def test_values_of_variables_show_in_no_ps(layers: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    container = started(layers, "sleep", "1000")
    script = 'echo "$SECRET"; cat; exit 3'
    command = [sys.executable, "-m", "mlenv", "exec", "-i", "-e", "SECRET", "-e", "OTHER=b\nc", container.id]
    monkeypatch.setenv("SECRET", "hidden=\u00e4")
    read_fd, write_fd = os.pipe()
    with subprocess.Popen(
        [*command, "sh", "-c", script], stdin=read_fd, stdout=subprocess.PIPE, text=True
    ) as core:  # fmt: skip
        os.close(read_fd)
        assert core.stdout
        assert core.stdout.readline() == "hidden=\u00e4\n"
        assert b"hidden" not in Path(f"/proc/{core.pid}/cmdline").read_bytes()
        os.close(write_fd)
        assert core.wait(20) == 3
    many = {"A": "x" * 100_000, "B": "1\r\n2"}
    argv = launching.exec_command(
        container, ["sh", "-c", "echo ${#A} ${#B}"], env_fd=launching.environment_file(many)
    )
    done = subprocess.run(argv, capture_output=True, text=True, check=False, close_fds=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "100000 4\n"), done.stderr


def test_a_shim_that_ends_while_we_come_has_left_the_status(
    layers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may finish between our connecting and its accepting: the connection then ends without a word."""
    container = started(layers, "sh", "-c", "exit 3")
    assert lifecycle.wait(container) == 3
    ours, theirs = socket.socketpair()
    theirs.close()
    monkeypatch.setattr(lifecycle, "_connect", lambda _: ours)
    assert lifecycle.wait(container) == 3
