"""Containers with a shim: started, attached, executed in, stopped, removed; all through `lifecycle`."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from containers import REPOSITORY
from requires import requires

from mlenv.container import config, launching, lifecycle, state
from mlenv.errors import (
    ContainerError,
    ContainerStartError,
    NameInUseError,
    NoSuchContainerError,
    PortInUseError,
)

pytestmark = requires("root", "overlay")

DEADLINE = 20.0


@pytest.fixture
def wanted(busybox_rootfs: Path) -> Any:
    def make(*args: str, **options: Any) -> dict[str, Any]:
        options.setdefault("network", "none")
        return config.runtime_config(args=args, env={"PATH": "/bin"}, layers=[busybox_rootfs], **options)

    return make


@pytest.fixture(autouse=True)
def removed(home: Path) -> Iterator[None]:
    yield
    for container in lifecycle.containers():
        lifecycle.remove(container, force=True)


def until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        select.select([], [], [], 0.01)


def output(container: lifecycle.Container) -> str:
    return b"".join(data for _, data in lifecycle.logs(container)).decode()


def started(made: dict[str, Any], **options: Any) -> lifecycle.Container:
    container = lifecycle.create(made, **options)
    lifecycle.start(container)
    return container


def test_a_container_s_life(wanted: Any) -> None:
    container = lifecycle.create(wanted("sh", "-c", "echo out; echo err >&2; exit 3"), name="one")
    assert (container.status, container.pid) == (lifecycle.Status.CREATED, None)
    lifecycle.start(container)
    assert lifecycle.wait(container) == 3
    found = lifecycle.find("one")
    assert (found.status, found.exit_code, found.pid) == (lifecycle.Status.STOPPED, 3, None)
    assert found.created <= found.started <= found.finished
    assert sorted(lifecycle.logs(found)) == [("stderr", b"err\n"), ("stdout", b"out\n")]
    lifecycle.remove(found)
    with pytest.raises(NoSuchContainerError):
        lifecycle.find("one")
    assert list(found.bundle.parent.glob("*/")) == []


def test_wait_can_be_asked_again_and_after_the_end(wanted: Any) -> None:
    container = started(wanted("sh", "-c", "exit 9"))
    assert [lifecycle.wait(container) for _ in range(3)] == [9, 9, 9]


def test_nobody_else_reaches_what_it_writes(wanted: Any, home: Path) -> None:
    """A setuid program that a container's root made is no way to the host's root. Source: CVE-2021-41103."""
    (home / "containers").mkdir(mode=0o711)
    container = started(wanted("sh", "-c", "cp /bin/busybox /bin/sesame; chmod 4755 /bin/sesame"))
    assert lifecycle.wait(container) == 0
    made = container.bundle / "upper" / "bin" / "sesame"
    assert made.stat().st_mode & 0o7777 == 0o4755
    nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
    with pytest.raises(PermissionError):
        subprocess.run([made, "id"], check=False, **nobody)
    assert (home / "containers").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", ["", "{}", '{"id": "x"', "[]"])
def test_a_damaged_state_is_shown_and_harms_no_other(wanted: Any, content: str) -> None:
    lost = lifecycle.create(wanted("true"), name="lost")
    (lost.bundle / "state.json").write_text(content)
    other = started(wanted("true"), name="other")
    assert lifecycle.wait(other) == 0
    assert {each.name: str(each.status) for each in lifecycle.containers()} == {
        "lost": "damaged",
        "other": "stopped",
    }
    with pytest.raises(ContainerError, match="damaged"):
        lifecycle.remove(lifecycle.find("lost"))
    lifecycle.remove(lifecycle.find("lost"), force=True)
    assert [each.name for each in lifecycle.containers()] == ["other"]


def test_a_name_is_free_while_another_container_goes(wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the look at each one may have been removed."""
    going = lifecycle.create(wanted("true"), name="going")
    listed = lifecycle._directories(going.bundle.parent)
    lifecycle.remove(going)
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "_directories", lambda _: listed)
        made = lifecycle.create(wanted("true"), name="staying")
    assert [each.name for each in lifecycle.containers()] == [made.name]


def test_found_by_name_id_and_beginning(wanted: Any) -> None:
    first = lifecycle.create(wanted("true"), name="alpha")
    lifecycle.create(wanted("true"), name="beta")
    assert {lifecycle.find(ref).id for ref in ("alpha", first.id, first.id[:9])} == {first.id}
    with pytest.raises(NameInUseError, match="alpha"):
        lifecycle.create(wanted("true"), name="alpha")
    with pytest.raises(ContainerError, match="no name"):
        lifecycle.create(wanted("true"), name="../x")


def test_its_identity_is_the_host_s_view_of_pid_1(wanted: Any) -> None:
    container = started(wanted("sleep", "100"))
    assert container.pid is not None
    status = Path(f"/proc/{container.pid}/status").read_text()
    assert [line.split()[-1] for line in status.splitlines() if line.startswith("NSpid")] == ["1"]
    lifecycle.stop(container, timeout=0)


def test_stop_gives_it_time_and_then_kills(wanted: Any) -> None:
    kind = started(
        wanted("sh", "-c", "trap 'echo bye; exit 4' TERM; echo up; while :; do usleep 10000; done")
    )
    until(lambda: "up" in output(kind))
    lifecycle.stop(kind)
    assert (kind.exit_code, output(kind)) == (4, "up\nbye\n")
    deaf = started(
        wanted(
            "sh", "-c", "trap '' TERM; (trap '' TERM; sleep 1000) & echo up; while :; do usleep 10000; done"
        )
    )
    until(lambda: "up" in output(deaf))
    lifecycle.stop(deaf, timeout=0.2)
    assert deaf.exit_code == 137
    lifecycle.stop(deaf)


def test_kill_sends_any_signal(wanted: Any) -> None:
    container = started(wanted("sh", "-c", "trap 'exit 6' USR1; echo up; while :; do usleep 10000; done"))
    until(lambda: "up" in output(container))
    lifecycle.kill(container, signal.SIGUSR1)
    assert lifecycle.wait(container) == 6
    with pytest.raises(ContainerError, match="not running"):
        lifecycle.kill(container, signal.SIGUSR1)


def test_a_running_one_is_removed_by_force_only(wanted: Any) -> None:
    container = started(wanted("sleep", "1000"))
    with pytest.raises(ContainerError, match="is running"):
        lifecycle.remove(container)
    lifecycle.remove(container, force=True)
    assert lifecycle.containers() == []


def test_started_again_it_has_what_it_wrote(wanted: Any) -> None:
    container = started(wanted("sh", "-c", "cat /count 2>/dev/null; echo x >> /count"))
    lifecycle.wait(container)
    lifecycle.start(container)
    lifecycle.wait(container)
    assert output(container) == "x\n"
    running = started(wanted("sleep", "1000"))
    with pytest.raises(ContainerError, match="running already"):
        lifecycle.start(running)


@pytest.mark.parametrize(
    ("args", "status"), [(("nosuch",), 127), (("/etc/passwd",), 126), (("/no/such",), 127)]
)
def test_a_start_that_fails_leaves_it_created(wanted: Any, args: tuple[str, ...], status: int) -> None:
    container = lifecycle.create(wanted(*args), name="bad")
    with pytest.raises(ContainerStartError) as raised:
        lifecycle.start(container)
    assert raised.value.exit_status == status
    assert lifecycle.find("bad").status is lifecycle.Status.CREATED


def run_attached(made: dict[str, Any], **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run as `mlenv run --rm` does, in a process of its own."""
    script = """
import json, sys
from mlenv.container import launching, lifecycle
container = lifecycle.create(json.loads(sys.argv[1]), remove_on_exit=True)
interactive = sys.argv[2] == "i"
lifecycle.start(container, interactive=interactive, attached=True)
sys.exit(lifecycle.attach(container, stdin=interactive))
"""
    interactive = "i" if "input" in options else "-"
    return subprocess.run(
        [sys.executable, "-c", script, json.dumps(made), interactive], capture_output=True, check=False,
        timeout=60, **options,
    )  # fmt: skip


def test_attached_and_removed_at_the_end(wanted: Any) -> None:
    done = run_attached(wanted("sh", "-c", "echo out; echo err >&2; exit 7"))
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert lifecycle.containers() == []


def test_stdin_reaches_it_with_its_end(wanted: Any) -> None:
    text = os.urandom(300_000)
    done = run_attached(wanted("cat"), input=text)
    assert done.stdout == text


def test_nothing_of_much_output_is_lost(wanted: Any) -> None:
    done = run_attached(wanted("sh", "-c", "seq 1 400000; echo end >&2"))
    assert done.stdout == b"".join(b"%d\n" % number for number in range(1, 400001))
    assert done.stderr == b"end\n"


def test_binary_output_is_kept(wanted: Any) -> None:
    container = started(wanted("sh", "-c", "printf '\\377\\000\\033[31m\\r\\n'"))
    lifecycle.wait(container)
    assert b"".join(data for _, data in lifecycle.logs(container)) == b"\xff\x00\x1b[31m\r\n"


def test_logs_tail_since_and_follow(wanted: Any) -> None:
    script = "for i in 1 2 3 4; do echo $i; done; read x; echo last"
    container = lifecycle.create(wanted("sh", "-c", script))
    lifecycle.start(container, interactive=True, attached=True)
    until(lambda: "4" in output(container))
    assert [data for _, data in lifecycle.logs(container, tail=2)] == [b"3\n", b"4\n"]
    assert list(lifecycle.logs(container, tail=0)) == []
    assert len(list(lifecycle.logs(container, tail=99))) == 4
    assert list(lifecycle.logs(container, since=time.time() + 60)) == []
    follower = lifecycle.logs(container, follow=True, tail=1)
    assert next(follower) == ("stdout", b"4\n")
    assert container.channel is not None
    from mlenv.container import frames

    container.channel.sendall(frames.frame(frames.STDIN, b"go\n"))
    assert list(follower) == [("stdout", b"last\n")]
    container.channel.close()


def test_several_can_be_executed_in_it(wanted: Any) -> None:
    container = started(wanted("sleep", "1000", user="7:8"))
    argv = launching.exec_command(
        container, ["sh", "-c", "id -u; echo $A; pwd; cat; exit 5"], env={"A": "b"}, cwd="/etc"
    )
    done = subprocess.run(argv, input="in\n", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "7\nb\n/etc\nin\n"), done.stderr
    as_root = launching.exec_command(container, ["id", "-u"], user="0")
    assert subprocess.run(as_root, capture_output=True, text=True, check=False).stdout == "0\n"


def test_executed_is_as_confined_as_the_first(wanted: Any) -> None:
    container = started(wanted("sh", "-c", "grep -e Cap -e NoNew -e Seccomp: /proc/self/status; sleep 1000"))
    until(lambda: "Seccomp" in output(container))
    argv = launching.exec_command(
        container, ["grep", "-e", "Cap", "-e", "NoNew", "-e", "Seccomp:", "/proc/self/status"]
    )
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout == output(container)
    namespaces = "for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done"
    argv = launching.exec_command(container, ["sh", "-c", namespaces])
    inside = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()
    assert inside == [
        str(Path(f"/proc/{container.pid}/ns/{kind}").readlink())
        for kind in ("cgroup", "ipc", "mnt", "net", "pid", "uts")
    ]


@requires("cgroup")
def test_executed_is_in_the_container_s_groups(wanted: Any) -> None:
    container = started(wanted("sleep", "1000"))
    first = Path(f"/proc/{container.pid}/cgroup").read_text()
    assert "/mlenv-" in first
    read_fd, write_fd = os.pipe()
    argv = launching.exec_command(container, ["sleep", "1000"], pid_fd=write_fd)
    with subprocess.Popen(argv, pass_fds=(write_fd,)) as process:
        os.close(write_fd)
        pid = int(os.read(read_fd, 32))
        os.close(read_fd)
        assert Path(f"/proc/{pid}/cgroup").read_text() == first
        process.terminate()
        assert process.wait(10) == 143


@pytest.mark.parametrize(("args", "status"), [(("nosuch",), 127), (("/etc/passwd",), 126)])
def test_executing_what_cannot_be(wanted: Any, args: tuple[str, ...], status: int) -> None:
    container = started(wanted("sleep", "1000"))
    done = subprocess.run(
        launching.exec_command(container, args), capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert "error[container-start]" in done.stderr


def test_executing_in_a_stopped_one(wanted: Any) -> None:
    container = started(wanted("true"))
    lifecycle.wait(container)
    done = subprocess.run(
        launching.exec_command(container, ["true"]), capture_output=True, text=True, check=False
    )
    assert done.returncode == 125
    assert "is not running" in done.stderr


def test_the_lifeline_kills_what_was_executed(wanted: Any) -> None:
    container = started(wanted("sleep", "1000"))
    pid_read, pid_write = os.pipe()
    line_read, line_write = os.pipe()
    argv = launching.exec_command(
        container, ["sh", "-c", "trap '' TERM INT; sleep 1000"], pid_fd=pid_write, lifeline_fd=line_read
    )
    with subprocess.Popen(argv, pass_fds=(pid_write, line_read)) as process:
        os.close(pid_write)
        os.close(line_read)
        assert int(os.read(pid_read, 32)) > 0
        os.close(pid_read)
        os.close(line_write)
        assert process.wait(10) == 137


def test_what_was_executed_ends_with_its_core_process(wanted: Any) -> None:
    container = started(wanted("sleep", "1000"))
    read_fd, write_fd = os.pipe()
    argv = launching.exec_command(container, ["sleep", "1001"], pid_fd=write_fd)
    with subprocess.Popen(argv, pass_fds=(write_fd,)) as process:
        os.close(write_fd)
        pid = int(os.read(read_fd, 32))
        os.close(read_fd)
        process.kill()
        process.wait(10)
    until(lambda: state.start_time(pid) is None)


class Person:
    """A terminal with a program behind it."""

    def __init__(self, *argv: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvp(argv[0], argv)  # noqa: S606 - it becomes the child of the terminal
        self.seen = b""

    def expect(self, text: bytes) -> None:
        deadline = time.monotonic() + DEADLINE
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            try:
                self.seen += os.read(self.fd, 4096)
            except OSError:
                raise AssertionError(f"ended without {text!r}: {self.seen!r}") from None
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def status(self) -> int:
        while True:
            ready, _, _ = select.select([self.fd], [], [], DEADLINE)
            assert ready
            try:
                if not os.read(self.fd, 4096):
                    break
            except OSError:
                break
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


ATTACH = (
    "import sys;from mlenv.container import lifecycle;sys.exit(lifecycle.attach(lifecycle.find(sys.argv[1])))"
)


def test_a_person_at_a_terminal(wanted: Any) -> None:
    """Prompt, Ctrl-C to the foreground job, detach, attach again with the screen's rest, exit status."""
    container = lifecycle.create(wanted("sh", terminal=True), name="tty")
    lifecycle.start(container, interactive=True)
    first = Person(sys.executable, "-c", ATTACH, "tty")
    first.type(b"echo a$((1+1))b; tty; ls -l /dev/console\n")
    first.expect(b"a2b")
    first.expect(b"/dev/pts/0")
    first.type(b"sleep 1000\n")
    first.expect(b"sleep 1000")
    until(lambda: b"sleep" in b"".join(Path(p, "comm").read_bytes() for p in map(str, Path("/proc").iterdir())
                                       if _in_same_pid_namespace(p, container)))  # fmt: skip
    first.type(b"\x03echo after$((2*3))\n")
    first.expect(b"after6")
    first.type(b"\x10")
    first.type(b"\x11")
    assert first.status() == 0
    assert lifecycle.find("tty").status.is_running
    second = Person(sys.executable, "-c", ATTACH, "tty")
    second.expect(b"after6")
    second.type(b"exit 7\n")
    assert second.status() == 7


def _in_same_pid_namespace(path: str, container: lifecycle.Container) -> bool:
    try:
        return Path(path, "ns/pid").readlink() == Path(f"/proc/{container.pid}/ns/pid").readlink()
    except OSError:
        return False


def test_two_can_watch(wanted: Any) -> None:
    container = lifecycle.create(wanted("sh", terminal=True), name="two")
    lifecycle.start(container, interactive=True)
    one, other = (Person(sys.executable, "-c", ATTACH, "two") for _ in range(2))
    one.type(b"echo x$((40+2))x\n")
    one.expect(b"x42x")
    other.expect(b"x42x")
    other.type(b"exit\n")
    assert (one.status(), other.status()) == (0, 0)


def test_an_executed_terminal(wanted: Any) -> None:
    container = started(wanted("sleep", "1000"))
    person = Person(*launching.exec_command(container, ["sh"], terminal=True))
    person.type(b"stty size; tty; echo $TERM; exit 3\n")
    person.expect(b"/dev/pts/0")
    assert person.status() == 3


def test_signals_of_an_attached_command_reach_the_program(wanted: Any) -> None:
    script = "trap 'echo caught; exit 3' INT; echo up; while :; do usleep 10000; done"
    made = wanted("sh", "-c", script)
    runner = (
        "import json,sys;from mlenv.container import lifecycle\n"
        "c=lifecycle.create(json.loads(sys.argv[1]));lifecycle.start(c,attached=True)\n"
        "sys.exit(lifecycle.attach(c,stdin=False))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", runner, json.dumps(made)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(10) == 3


@requires("cgroup")
def test_out_of_memory_is_told(wanted: Any) -> None:
    made = wanted("sh", "-c", "head -c 200m /dev/zero | tail", resources=config.Resources(memory=32 << 20))
    container = started(made)
    assert lifecycle.wait(container) in (0, 1, 137)
    assert lifecycle.find(container.id).oom_killed


def test_out_of_memory_at_the_start_is_told(wanted: Any) -> None:
    container = lifecycle.create(wanted("true", resources=config.Resources(memory=4096)))
    with pytest.raises(ContainerStartError, match="ran out of memory") as raised:
        lifecycle.start(container)
    assert raised.value.exit_status == 125


def test_the_attach_socket_is_ours_alone(wanted: Any) -> None:
    container = started(wanted("sleep", "1000"))
    path = Path(state.read(str(container.bundle))["socket"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_client_that_talks_nonsense_is_dropped(wanted: Any) -> None:
    from mlenv.container import attaching

    container = started(wanted("sleep", "1000"))
    path = state.read(str(container.bundle))["socket"]
    connection = attaching.connect(path)
    connection.sendall(b"i\xff\xff\xff\xff" + b"x" * 100)
    until(lambda: _at_end(connection))
    connection.close()
    assert lifecycle.find(container.id).status.is_running


def _at_end(connection: Any) -> bool:
    try:
        return not connection.recv(4096)
    except ConnectionResetError:
        return True


def test_the_shim_is_small(wanted: Any) -> None:
    """Private memory of the process that stays with each container, in kB."""
    container = started(wanted("sleep", "1000"))
    shim = state.read(str(container.bundle))["shim"]["pid"]
    rollup = Path(f"/proc/{shim}/smaps_rollup").read_text().splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) for line in rollup[1:]}
    assert sizes["Pss:"] <= 8192


def test_a_port_in_use_is_refused_before_anything_exists(wanted: Any) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = config.Port(host_port=taken.getsockname()[1], container_port=80)
        container = lifecycle.create(wanted("true", ports=[port]), name="port")
        with pytest.raises(PortInUseError, match=str(port.host_port)):
            lifecycle.start(container)
    assert lifecycle.find("port").status is lifecycle.Status.CREATED


@requires("netns")
def test_a_published_port_reaches_the_program(wanted: Any) -> None:
    import socket

    port = config.Port(host_port=0, container_port=80)
    made = wanted("true", ports=[port])
    made["process"]["args"] = ["busybox", "httpd", "-f", "-p", "127.0.0.1:80", "-h", "/etc"]
    container = started(made)
    bound = container.ports[0]
    assert bound.host_port > 0

    def answer() -> bool:
        with socket.create_connection((bound.host_ip, bound.host_port), timeout=5) as connection:
            try:
                connection.sendall(b"GET /passwd HTTP/1.0\r\n\r\n")
                return b"200 OK" in connection.recv(100)
            except ConnectionResetError:
                return False

    until(answer)


@requires("netns", "nft")
def test_a_private_network_has_an_address_and_names(wanted: Any) -> None:
    script = "cat /etc/hosts; wc -l < /etc/resolv.conf; sleep 1000"
    container = started(wanted("sh", "-c", script, network="private", hostname="inside"))
    until(lambda: output(container).count("\n") >= 4)
    assert any(
        line.endswith("inside") and not line.startswith("127.") for line in output(container).splitlines()
    )


def test_looking_is_light(home: Path) -> None:
    """`ps` and `stop` load nothing that a container's start needs, nor anything heavy."""
    script = "import sys; before = set(sys.modules)\n"
    script += "from mlenv.container import lifecycle; lifecycle.containers()\n"
    script += "print(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    heavy = {"subprocess", "socket", "asyncio", "logging", "json", "argparse", "ctypes", "urllib", "shutil"}
    assert not heavy & set(done.stdout.split())
