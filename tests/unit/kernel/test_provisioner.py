"""The provisioner under jupyter_client's own KernelManager, with the host standing in for the container."""

from __future__ import annotations

import asyncio
import logging
import signal

import pytest
from jupyter_client.manager import AsyncKernelManager
from unit.kernel import stand_in

from mlenv import paths
from mlenv.errors import KernelError
from mlenv.jupyter.kernelspecs import EnvironmentKernelSpecManager
from mlenv.kernel import kernelspec, process
from mlenv.kernel.provisioner import MlenvProvisioner


@pytest.fixture(autouse=True)
def core(short_home, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setattr(process, "lifecycle", stand_in)
    monkeypatch.setattr(process, "launching", stand_in)
    mounted = {"destination": str(tmp_path), "source": str(tmp_path), "options": ["rbind"]}
    monkeypatch.setattr(stand_in, "running", [stand_in.container("train", mounts=[mounted])])
    kernelspec.install("train", "Train", lock="sha256:1", env={"FROM_SPEC": "1"})


@pytest.fixture
def manager():
    return AsyncKernelManager(kernel_name="train", kernel_spec_manager=EnvironmentKernelSpecManager())


def directories():
    root = paths.kernel_dir("0" * 64)
    return sorted(root.iterdir()) if root.exists() else []


async def value(client, code):
    """Return what `print(...)` in a cell prints."""
    printed = []
    await client.execute_interactive(
        code, timeout=30, output_hook=lambda message: printed.append(message["content"].get("text", ""))
    )
    return "".join(printed).strip()


def test_one_life_of_a_kernel(manager, tmp_path):
    async def flow():
        await manager.start_kernel(cwd=str(tmp_path))
        assert manager.transport == "ipc"
        assert len(directories()) == 1
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=30)
        assert (
            await value(client, "import os; print(os.getcwd(), os.environ['FROM_SPEC'])") == f"{tmp_path} 1"
        )

        first = int(await value(client, "print(os.getpid())"))
        info = await manager.provisioner.get_provisioner_info()
        assert (info["pid"], info["environment"]) == (first, "train")
        adopted = MlenvProvisioner(kernel_spec=manager.kernel_spec)
        await adopted.load_provisioner_info(info)
        assert adopted.has_process
        assert await adopted.poll() is None

        await manager.restart_kernel(now=True)
        await client.wait_for_ready(timeout=30)
        assert await adopted.poll() is not None
        assert int(await value(client, "import os; print(os.getpid())")) != first
        assert len(directories()) == 1
        client.stop_channels()
        await manager.shutdown_kernel()
        assert directories() == []
        assert not manager.has_kernel
        await manager.provisioner.cleanup()

    asyncio.run(flow())


def test_an_environment_that_is_not_up_says_so_and_leaves_nothing(manager, monkeypatch):
    monkeypatch.setattr(stand_in, "running", [])
    with pytest.raises(KernelError, match="environment `train` is not running"):
        asyncio.run(manager.start_kernel())
    assert directories() == []


def test_a_kernel_that_cannot_start_leaves_no_directory(manager, monkeypatch):
    monkeypatch.setattr(
        "mlenv.kernel.provisioner.start_kernel", lambda container, _, **more: failing(container, **more)
    )

    async def failing(container, **more):
        return await process.start_kernel(container, ["false"], **more)

    with pytest.raises(KernelError, match="ended while it was starting"):
        asyncio.run(manager.start_kernel())
    assert directories() == []


def launched_with(manager, monkeypatch, **kwargs):
    """Return the keywords `start_kernel` gets, and the provisioner; nothing is started."""
    seen = {}

    async def take(container, args, **more):
        seen.update(more, args=args)
        raise KernelError("taken")

    monkeypatch.setattr("mlenv.kernel.provisioner.start_kernel", take)
    with pytest.raises(KernelError, match="taken"):
        asyncio.run(manager.start_kernel(**kwargs))
    return seen


def test_extra_arguments_and_path_objects_are_honoured(manager, monkeypatch, tmp_path):
    seen = launched_with(manager, monkeypatch, cwd=tmp_path, extra_arguments=["--quiet"])
    assert seen["args"][:3] == ["python", "-m", "ipykernel_launcher"]
    assert seen["args"][-1] == "--quiet"
    assert str(seen["cwd"]) == str(tmp_path)


def test_a_folder_that_is_not_mounted_gives_the_containers_own_and_says_so(manager, monkeypatch, caplog):
    manager.log = logging.getLogger("test")
    with caplog.at_level(logging.WARNING):
        seen = launched_with(manager, monkeypatch, cwd="/usr")
    assert seen["cwd"] is None
    assert "`/usr` is not mounted in environment `train`" in caplog.text


def test_the_kernelspec_wins_over_the_container_and_the_container_over_the_host(manager, monkeypatch):
    stand_in.running[0].config["process"]["env"] = ["A=image", "FROM_SPEC=image"]
    seen = launched_with(manager, monkeypatch, env={"A": "host", "B": "host", "PATH": "/host"})
    assert seen["variables"].inherited == {"B": "host"}
    assert seen["variables"].explicit == {"FROM_SPEC": "1", "JPY_PARENT_PID": "1"}


def test_another_lock_than_the_kernelspecs_is_noted(manager, monkeypatch, caplog):
    manager.log = logging.getLogger("test")
    stand_in.running[0].config["annotations"]["dev.mlenv.lock"] = "sha256:2"
    with caplog.at_level(logging.WARNING):
        launched_with(manager, monkeypatch)
    assert "sha256:2" in caplog.text


def test_paths_are_resolved_through_the_mounts(manager, monkeypatch, tmp_path):
    (tmp_path / "data.csv").touch()
    mount = {"destination": "/inside", "source": str(tmp_path), "options": ["rbind"]}
    stand_in.running[0].config["mounts"] = [mount]
    provisioner = MlenvProvisioner(environment="train", parent=manager, kernel_spec=manager.kernel_spec)
    assert provisioner.resolve_path("data.csv") is None
    asyncio.run(provisioner.pre_launch(env={}))
    assert str(provisioner._folder(stand_in.running[0].config, tmp_path)) == "/inside"
    assert provisioner.resolve_path("data.csv") == str(tmp_path / "data.csv")
    assert provisioner.resolve_path("/inside/data.csv") == str(tmp_path / "data.csv")
    assert provisioner.resolve_path("/inside/none.csv") is None
    assert provisioner.resolve_path("/etc/passwd") is None
    asyncio.run(provisioner.cleanup())


def test_another_container_of_the_environment_gets_a_directory_of_its_own(manager, monkeypatch):
    provisioner = MlenvProvisioner(environment="train", parent=manager, kernel_spec=manager.kernel_spec)
    asyncio.run(provisioner.pre_launch(env={}))
    first = provisioner.connection_info
    asyncio.run(provisioner.pre_launch(env={}))
    assert provisioner.connection_info == first
    another = stand_in.container("train")
    another.id = "1" * 64
    monkeypatch.setattr(stand_in, "running", [another])
    asyncio.run(provisioner.pre_launch(env={}))
    assert provisioner.connection_info["ip"] != first["ip"]
    assert directories() == []
    asyncio.run(provisioner.cleanup())


def test_without_a_process_signals_go_nowhere(manager):
    provisioner = MlenvProvisioner(environment="train", parent=manager)
    assert not provisioner.has_process
    asyncio.run(provisioner.send_signal(signal.SIGINT))
    asyncio.run(provisioner.kill())
    assert asyncio.run(provisioner.poll()) == 0
    assert asyncio.run(provisioner.wait()) == 0
