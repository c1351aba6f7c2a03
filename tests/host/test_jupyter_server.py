"""The JupyterLab server as a process: started once, joined, moved off a taken port, ended, never orphaned."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlenv.container.state import start_time
from mlenv.errors import JupyterError
from mlenv.jupyter import api, configuration, server
from mlenv.kernel import kernelspec

DEADLINE = 60.0


@pytest.fixture(autouse=True)
def stopped_in_the_end(leak_check: None) -> Iterator[None]:
    yield
    server.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.02)


def up(folder: Path, port: int, *, explicit: bool = False) -> server.Server:
    started = server.start_or_join(folder, port=port, explicit_port=explicit)
    started.wait()
    return started


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def test_one_life_of_a_server(home, folder, free_port):
    first = up(folder, free_port)
    assert (first.port, first.started, first.taken_by, first.root_dir) == (free_port, True, "", folder)
    assert api.request(first.port, first.token, "GET", "/api/status")[0] == 200
    assert api.request(first.port, "wrong", "GET", "/api/kernels")[0] == 403

    second = up(folder.parent, free_port)
    assert (second.url, second.started, second.root_dir) == (first.url, False, folder)
    assert server.find().pid == first.pid

    assert server.stop()
    assert start_time(first.pid) is None
    assert files_below(home) == []
    assert server.find() is None
    assert not server.stop()


def test_it_listens_on_this_machine_only_and_keeps_its_token_private(home, folder, free_port):
    running = up(folder, free_port)
    tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    bound = {
        line.split()[1] for line in tables.splitlines() if f":{free_port:04X} " in line and " 0A " in line
    }
    assert bound == {f"0100007F:{free_port:04X}"}
    assert running.token not in Path(f"/proc/{running.pid}/cmdline").read_text()
    assert running.token not in Path(f"/proc/{running.pid}/environ").read_text()
    assert running.token in running.page.read_text()
    for path in configuration.directory().rglob("*"):
        if path.is_file() and running.token in path.read_text(errors="replace"):
            assert path.is_relative_to(home / "run")
    assert stat.S_IMODE((home / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "run" / "jupyter" / "server.json").stat().st_mode) == 0o600


def test_it_shows_environments_only_and_new_ones_without_restart(home, folder, free_port):
    running = up(folder, free_port)
    assert _kernelspecs(running) == {}
    kernelspec.install("train", "PyTorch 1.7 (CUDA 10.1)", lock="")
    shown = _kernelspecs(running)
    assert {name: entry["spec"]["display_name"] for name, entry in shown.items()} == {
        "train": "PyTorch 1.7 (CUDA 10.1)"
    }
    logo = shown["train"]["resources"]["logo-svg"]
    assert api.request(running.port, running.token, "GET", logo)[0] == 200
    assert api.request(running.port, running.token, "POST", "/api/kernels")[0] == 500
    assert api.kernels(running) == ()


def _kernelspecs(running: server.Server) -> dict[str, dict]:
    return api.request(running.port, running.token, "GET", "/api/kernelspecs")[1]["kernelspecs"]


def test_a_taken_port_moves_it_to_the_next_and_says_who_holds_it(home, folder, free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        running = up(folder, free_port)
        assert running.port > free_port
        assert running.taken_by.endswith(f"(pid {os.getpid()})")


def test_a_taken_port_that_was_asked_for_is_an_error_that_names_the_holder(home, folder, free_port):
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(JupyterError) as caught:
        server.start_or_join(folder, port=free_port, explicit_port=True)
    assert caught.value.code == "port-in-use"
    assert f"(pid {os.getpid()})" in caught.value.cause
    assert files_below(home) == []


def test_a_port_lost_between_the_look_and_the_bind_is_left_for_the_next(home, folder, free_port):
    started = server.start_or_join(folder, port=free_port)
    first = started.pid
    with socket.create_server(("127.0.0.1", free_port)):  # long before JupyterLab has imported itself
        started.wait()
    assert started.port > free_port
    assert started.pid != first
    assert start_time(first) is None
    assert api.answers(started.port, started.token)


def test_a_server_that_cannot_start_is_an_error_with_its_last_words(home, folder, free_port, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (folder / "jupyterlab.py").write_text("raise SystemExit('no lab today')\n")
    with pytest.raises(JupyterError) as caught:
        up(folder, free_port)
    assert caught.value.code == "jupyter-not-started"
    assert "no lab today" in caught.value.cause
    assert server.find() is None


def test_two_commands_at_once_share_one_server(home, folder, free_port):
    script = (
        "import sys; from pathlib import Path; from mlenv.jupyter import server\n"
        "s = server.start_or_join(Path(sys.argv[1]), port=int(sys.argv[2])); s.wait()\n"
        "print(s.url, s.started)"
    )
    command = [sys.executable, "-c", script, str(folder), str(free_port)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=DEADLINE)[0].split() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said[0][0] == said[1][0]
    assert sorted(started for _, started in said) == ["False", "True"]


@pytest.mark.parametrize("moment", ["before it answers", "before it is confirmed"])
def test_a_killed_starter_leaves_no_server(home, folder, free_port, moment):
    answered = "starting.answers();" if moment == "before it is confirmed" else ""
    script = (
        "import sys; from pathlib import Path; from mlenv.jupyter import server\n"
        f"s = server.start_or_join(Path(sys.argv[1]), port=int(sys.argv[2])); s.{answered or 'pid;'}"
        "print(s.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(folder), str(free_port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        pid = int(starter.stdout.readline())
        assert start_time(pid) is not None
        starter.kill()
    until(lambda: start_time(pid) is None)
    assert server.find() is None
    assert up(folder, free_port).started  # what it left behind is in nobody's way


def test_a_killed_server_is_forgotten(home, folder, free_port):
    first = up(folder, free_port)
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: start_time(first.pid) is None)
    assert server.find() is None
    assert up(folder, free_port).started


def test_a_process_that_has_the_servers_old_number_is_left_alone(home, folder, free_port):
    up(folder, free_port)
    server.stop()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        state = {
            "pid": stranger.pid,
            "start_time": start_time(stranger.pid) - 1,
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "port": free_port,
            "token": "t",
            "root_dir": str(folder),
            "confirmed": True,
        }
        (configuration.directory() / "server.json").write_text(json.dumps(state))
        assert server.find() is None
        assert not server.stop()
        assert stranger.poll() is None
        stranger.kill()


def test_a_server_that_does_not_listen_to_reason_is_ended_by_signal(home, folder, free_port, monkeypatch):
    running = up(folder, free_port)
    os.kill(running.pid, signal.SIGSTOP)
    monkeypatch.setattr(server, "_STOP_DEADLINE", 0.5)
    assert server.stop()
    assert start_time(running.pid) is None
