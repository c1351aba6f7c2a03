"""Starting a kernel's process, and everything that can keep it from starting."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from unit.kernel import stand_in

from mlenv.container.state import start_time
from mlenv.errors import KernelError
from mlenv.kernel import process
from mlenv.kernel.connection import CHANNELS, new_connection
from mlenv.kernel.variables import Variables

NOTHING = Variables(inherited={}, explicit={})
LISTEN = """
import json, socket, sys, time
c = json.load(open(sys.argv[1]))
kept = []
for channel in ("shell", "iopub", "stdin", "control", "hb"):
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].bind(f"{c['ip']}-{c[channel + '_port']}")
    kept[-1].listen()
"""


@pytest.fixture(autouse=True)
def core(short_home, monkeypatch):
    monkeypatch.setattr(process, "lifecycle", stand_in)
    monkeypatch.setattr(process, "launching", stand_in)
    monkeypatch.setattr(stand_in, "running", [stand_in.container("train")])


@pytest.fixture
def connection():
    return new_connection("0" * 64, {"key": "k", "signature_scheme": "hmac-sha256"})


def start(args, connection, **stdio):
    return process.start_kernel(
        process.running_container("train"),
        args,
        connection=connection,
        variables=NOTHING,
        cwd=None,
        stdio=stdio,
    )


def run(script, connection):
    return start(["python", "-c", script, str(connection.file)], connection)


def children():
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_it_returns_when_all_sockets_are_bound(connection):
    async def flow():
        kernel = await run(LISTEN + "time.sleep(60)", connection)
        assert all(connection.socket(channel).is_socket() for channel in CHANNELS)
        assert kernel.poll() is None
        kernel.send_signal(signal.SIGTERM)
        assert await kernel.wait() == -signal.SIGTERM
        kernel.send_signal(signal.SIGTERM)  # to nobody
        kernel.close()
        kernel.close()

    asyncio.run(flow())


def test_the_exit_status_is_the_kernels(connection):
    async def flow():
        kernel = await run(LISTEN + "sys.exit(7)", connection)
        assert await kernel.wait() == 7

    asyncio.run(flow())


def test_sockets_of_an_earlier_kernel_do_not_count(connection):
    connection.prepare()
    for channel in CHANNELS:
        connection.socket(channel).touch()
    assert connection.is_bound
    with pytest.raises(KernelError):
        asyncio.run(run("sys.exit", connection))


def test_letting_the_lifeline_go_kills_it(connection):
    async def flow():
        kernel = await run(LISTEN + "time.sleep(60)", connection)
        kernel.close()
        assert await kernel.wait() == -signal.SIGKILL

    asyncio.run(flow())


def test_a_signal_reaches_what_a_cell_started(connection, tmp_path):
    script = f"""
import subprocess
child = subprocess.Popen(["sleep", "60"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
{LISTEN}
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(0 if child.wait() == -2 else 1)
"""

    async def flow():
        kernel = await run(script, connection)
        kernel.send_signal(signal.SIGINT)
        assert await kernel.wait() == 0

    asyncio.run(flow())
    assert start_time(int((tmp_path / "child").read_text())) is None


@pytest.mark.parametrize(
    ("args", "code", "cause", "hint"),
    [
        (["no-such-python"], "kernel-not-started", "`no-such-python` was not found", "no-such-python"),
        (["sh", "-c", "echo broken >&2; exit 3"], "kernel-died", "broken", "ipykernel_launcher --version"),
        (
            ["sh", "-c", "echo No module named ipykernel >&2; exit 1"],
            "kernel-died",
            "ipykernel",
            "`packages:`",
        ),
        (["true"], "kernel-died", "status 0 and wrote nothing", "train"),
    ],
)
def test_a_kernel_that_does_not_start_says_why_and_what_to_do(connection, args, code, cause, hint):
    before = children()
    with pytest.raises(KernelError) as caught:
        asyncio.run(start(args, connection))
    assert caught.value.code == code
    assert cause in caught.value.cause
    assert hint in caught.value.hint
    assert children() == before


def test_a_kernel_that_never_listens_is_ended_after_the_deadline(connection, monkeypatch):
    monkeypatch.setattr(process, "START_DEADLINE", 0.3)
    before = children()
    with pytest.raises(KernelError) as caught:
        asyncio.run(start(["sleep", "60"], connection))
    assert caught.value.code == "kernel-silent"
    assert children() == before


def test_a_cancelled_start_leaves_nothing(connection):
    async def flow():
        task = asyncio.create_task(start(["sleep", "60"], connection))
        deadline = time.monotonic() + 10
        while not children() - before:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = children()
    asyncio.run(flow())
    assert children() == before


def test_descriptors_are_closed_again(connection):
    def open_descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    async def flow():
        kernel = await run(LISTEN, connection)
        await kernel.wait()
        kernel.stderr_tail()
        kernel.close()

    asyncio.run(flow())
    before = open_descriptors()
    for _ in range(3):
        asyncio.run(flow())
    assert open_descriptors() == before


def test_an_environment_that_is_not_up_is_named_with_the_command_for_it():
    with pytest.raises(KernelError) as caught:
        process.running_container("other")
    assert caught.value.code == "environment-not-running"
    assert caught.value.hint == "mlenv up other"
