"""`mlenv up quickstart`, then a front end that selects the container's kernel and works with it.

The server, the container, the kernel and the messages are the real ones. Nothing is built here: the image
comes from the session's `built_home`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host.environment_up import Up, environment_up, kernel_directories
from host.front_end import Kernel
from jupyter_client.manager import KernelManager
from requires import requires

from mlenv.container.state import start_time

pytestmark = requires("overlay")
REPOSITORY = Path(__file__).parents[2]
DEADLINE = 60.0

SLEEPERS = """
import pathlib
lines = [path.read_text().split('\\0') for path in pathlib.Path('/proc').glob('[0-9]*/cmdline')]
print([line for line in lines if '600' in line])
"""


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def up(built_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """The environment `quickstart`, up in a project folder with a name that needs care."""
    project = tmp_path_factory.mktemp("project") / "mein Prøjekt 1"
    (project / "sub").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "envs", project / "envs")
    with environment_up(built_home, project, "quickstart") as running:
        yield running


@pytest.fixture
def kernel(up: Up) -> Iterator[Kernel]:
    opened = up.front_end.open_notebook("sub/work.ipynb", "quickstart")
    yield opened
    opened.close()
    up.front_end.call("DELETE", f"/api/kernels/{opened.id}")


def host_pid(kernel: Kernel) -> int:
    """Return the kernel's pid on the host, found by its pid in the container."""
    inside = kernel.run("import os; print(os.getpid(), os.readlink('/proc/self/ns/pid'))").text.split()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            numbers = (entry / "status").read_text().partition("NSpid:")[2].splitlines()[0].split()
            if numbers[-1] == inside[0] and str((entry / "ns/pid").readlink()) == inside[1]:
                return int(entry.name)
        except (OSError, IndexError):
            continue
    raise AssertionError(f"no process of the host is {inside}")


def test_the_launcher_shows_the_environment_and_nothing_else(up):
    assert list(up.front_end.kernelspecs()) == ["quickstart"]
    assert up.front_end.kernelspecs()["quickstart"].startswith("quickstart")


def test_the_kernel_is_the_containers(up, kernel):
    """Root filesystem, host name and namespaces, read from the answer to a cell."""
    code = (
        "import json, os, platform, sys; print(json.dumps({"
        "'os': platform.freedesktop_os_release()['VERSION_CODENAME'], 'host': platform.node(),"
        "'root': os.stat('/').st_dev, 'python': sys.prefix, 'pid': os.getpid(),"
        "'first': open('/proc/1/comm').read(),"
        "**{name: os.readlink(f'/proc/self/ns/{name}') for name in ('pid', 'mnt', 'ipc', 'uts', 'net')}}))"
    )
    seen = json.loads(kernel.run(code).text)
    lock = json.loads((up.project / "envs" / "quickstart.lock.json").read_text())
    assert seen["os"] == lock["base"]["suite"]
    assert seen["host"] == "quickstart"
    assert seen["host"] != socket.gethostname()
    assert seen["root"] != Path("/").stat().st_dev
    assert seen["python"] == "/opt/env"
    assert seen["pid"] != host_pid(kernel)
    assert seen["first"] != Path("/proc/1/comm").read_text()
    for name in ("pid", "mnt", "ipc", "uts", "net"):
        assert seen[name] != str(Path(f"/proc/self/ns/{name}").readlink()), name


def test_versions_are_the_locks(up, kernel):
    lock = json.loads((up.project / "envs" / "quickstart.lock.json").read_text())
    locked = {wheel["name"]: wheel["version"] for wheel in lock["wheels"]}
    for name in ("numpy", "matplotlib", "ipykernel"):
        assert kernel.run(f"import {name}; print({name}.__version__)").text.strip() == locked[name]


def test_the_notebooks_folder_is_the_working_directory_and_files_are_the_users(up, kernel):
    assert kernel.run("import os; print(os.getcwd())").text.strip() == str(up.project / "sub")
    session = kernel.run("print(os.environ['JPY_SESSION_NAME'], os.environ.get('JPY_PARENT_PID'))").text
    assert session.strip() == f"{up.project / 'sub' / 'work.ipynb'} 1"
    kernel.run("open('made by a cell.txt', 'w').write('hello')")
    made = up.project / "sub" / "made by a cell.txt"
    assert made.read_text() == "hello"
    assert made.stat().st_uid == os.getuid()


def test_the_hosts_variables_arrive_but_not_those_about_the_host(kernel):
    code = "import os; print(os.environ['FROM_THE_HOST'], os.environ['PATH'], 'CONDA_PREFIX' in os.environ)"
    passed, path, has_conda = kernel.run(code).text.split()
    assert passed == "passed"
    assert path.startswith("/opt/env/bin:")
    assert has_conda == "False"


def test_values_plots_errors_and_shell_lines_come_back(kernel):
    assert kernel.run("6 * 7").value == "42"
    plot = kernel.run("import matplotlib.pyplot as plt; plt.plot([1, 3, 2]); plt.show()")
    assert "image/png" in plot.media
    assert kernel.run("1 / 0").error == "ZeroDivisionError"
    assert "VERSION_CODENAME" in kernel.run("!cat /etc/os-release").text


def test_a_cell_can_ask(kernel):
    cell = kernel.run("print(input('name? ') + '!')", answer="ada")
    assert cell.text == "name? ada!\n"


@pytest.mark.parametrize(
    "waiting",
    [
        "time.sleep(600)",
        "while True: pass",
        "subprocess.run(['sleep', '600'])",
        "get_ipython().system('sleep 600')",
    ],
)
def test_interrupt_stops_what_runs_and_keeps_the_variables(kernel, waiting):
    kernel.run("import time, subprocess; kept = 41")
    request = kernel.begin(f"print('begun', flush=True)\n{waiting}")
    kernel.wait_for_text(request, "begun")
    kernel.interrupt()
    cell = kernel.finish(request)
    assert cell.error in ("KeyboardInterrupt", "")  # a shell line swallows it, as with a local kernel
    assert kernel.run("kept + 1").value == "42"
    assert kernel.run(SLEEPERS).text.strip() == "[]"


def test_restart_begins_anew_under_the_same_id(up, kernel):
    kernel.run("kept = 1")
    first = host_pid(kernel)
    kernel.restart()
    assert kernel.run("kept").error == "NameError"
    assert start_time(first) is None
    assert len(kernel_directories(up.home)) == 1


def test_a_dead_kernel_is_started_again_by_itself(up, kernel):
    first = host_pid(kernel)
    request = kernel.begin("import os; os.kill(os.getpid(), 9)")
    del request
    kernel.wait_for_state("restarting")
    assert start_time(first) is None
    kernel.reconnect()
    assert kernel.run("40 + 2").value == "42"
    assert [model["id"] for model in up.front_end.kernels()] == [kernel.id]


def test_shutdown_leaves_no_process_and_no_directory(up, kernel):
    pid = host_pid(kernel)
    kernel.shut_down()
    until(lambda: start_time(pid) is None)
    assert up.front_end.kernels() == []
    assert kernel_directories(up.home) == []


def test_a_kernel_that_refuses_to_end_is_ended(up, kernel):
    pid = host_pid(kernel)
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True)\n"
        "while True:\n    try: time.sleep(1)\n    except KeyboardInterrupt: pass"
    )
    kernel.wait_for_text(kernel.begin(code), "begun")
    kernel.shut_down()
    until(lambda: start_time(pid) is None)


def test_many_restarts_leave_nothing_behind(up, kernel):
    def processes() -> int:
        return int(kernel.run("print(sum(p.isdigit() for p in __import__('os').listdir('/proc')))").text)

    before = processes()
    descriptors = _open_descriptors(up)
    for _ in range(5):
        kernel.restart()
        assert kernel.run("1").value == "1"
    assert processes() == before
    assert len(kernel_directories(up.home)) == 1
    assert _open_descriptors(up) <= descriptors + 2  # sockets that close late


def _open_descriptors(up: Up) -> int:
    return len(list(Path(f"/proc/{up.server['pid']}/fd").iterdir()))


def test_kernels_of_one_environment_share_their_container(up, kernel):
    other = up.front_end.open_notebook("other.ipynb", "quickstart")
    try:
        assert host_pid(other) != host_pid(kernel)
        other.run("open('/tmp/shared', 'w').write('seen')")
        assert kernel.run("print(open('/tmp/shared').read())").text == "seen\n"
    finally:
        other.shut_down()


def test_another_front_end_without_provisioners_runs_the_kernelspecs_argv(up, tmp_path, monkeypatch):
    """As VS Code does: it picks TCP ports itself and starts `argv`."""
    spec = json.loads((up.home / "jupyter" / "kernels" / "quickstart" / "kernel.json").read_text())
    del spec["metadata"]["kernel_provisioner"]
    (tmp_path / "kernels" / "plain").mkdir(parents=True)
    (tmp_path / "kernels" / "plain" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    manager = KernelManager(kernel_name="plain")
    manager.start_kernel(cwd=str(up.project))
    try:
        assert manager.transport == "tcp"
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=DEADLINE)
        printed = []
        ask = "import os, platform; print(platform.node(), os.getcwd(), input('? '))"
        client.execute_interactive(
            ask,
            timeout=DEADLINE,
            output_hook=lambda message: printed.append(message["content"].get("text", "")),
            stdin_hook=lambda _: client.input("yes"),
        )
        assert "".join(printed) == f"quickstart {up.project} yes\n"
        big = client.execute("x = 'a' * 20_000_000; x")
        reply = client.get_shell_msg(timeout=DEADLINE)
        assert (reply["parent_header"]["msg_id"], reply["content"]["status"]) == (big, "ok")
        request = client.execute("import time; print('begun', flush=True); time.sleep(600)")
        while client.get_iopub_msg(timeout=DEADLINE)["content"].get("text") != "begun\n":
            pass
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=DEADLINE)
        assert (reply["parent_header"]["msg_id"], reply["content"]["ename"]) == (request, "KeyboardInterrupt")
        client.stop_channels()
    finally:
        manager.shutdown_kernel()
    assert not manager.is_alive()
    assert kernel_directories(up.home) == []


def test_a_front_end_that_is_killed_takes_its_kernel_along(up, tmp_path):
    connection = tmp_path / "connection.json"
    ports = {f"{channel}_port": _free_port() for channel in ("shell", "iopub", "stdin", "control", "hb")}
    document = {"transport": "tcp", "ip": "127.0.0.1", "key": "k", "signature_scheme": "hmac-sha256", **ports}
    connection.write_text(json.dumps(document))
    launch = [sys.executable, "-m", "mlenv.kernel", "launch", "quickstart", "-f", str(connection)]
    environment = {**os.environ, "MLENV_HOME": str(up.home)}
    parent = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", parent, *launch], env=environment, cwd=up.project) as front:
        try:
            until(lambda: _connects(ports["shell_port"]))
        finally:
            front.send_signal(signal.SIGKILL)
    until(lambda: kernel_directories(up.home) == [])
    until(lambda: not _connects(ports["shell_port"]))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _connects(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_a_killed_server_takes_its_kernels_along_and_the_next_up_starts_anew(up):
    kernel = up.front_end.open_notebook("killed.ipynb", "quickstart")
    pid = host_pid(kernel)
    os.kill(up.server["pid"], signal.SIGKILL)
    until(lambda: start_time(pid) is None)
    kernel.close()
    said = json.loads(up.mlenv("up", "quickstart", "--no-browser", "--json").stdout)
    assert said["started"] is False
    assert said["container"] == up.container
    up.front_end.open_notebook("next.ipynb", "quickstart").shut_down()


def test_when_the_container_is_gone_the_kernel_says_so_and_the_server_lives(up):
    up.mlenv("rm", "-f", up.container)
    body = {"path": "a.ipynb", "name": "a", "type": "notebook", "kernel": {"name": "quickstart"}}
    status, answer = up.front_end.call("POST", "/api/sessions", body)
    assert status == 500
    assert "environment `quickstart` is not running" in answer["message"]
    assert "mlenv up quickstart" in answer["message"]
    assert up.front_end.call("GET", "/api/status")[0] == 200
    assert json.loads(up.mlenv("up", "quickstart", "--no-browser", "--json").stdout)["started"] is True
    up.front_end.open_notebook("a.ipynb", "quickstart").shut_down()
