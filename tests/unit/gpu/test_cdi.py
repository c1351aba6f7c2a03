"""CDI specifications and container edits of a host that is laid out in a directory."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mlenv.container.gpu import cdi, nvidia
from mlenv.errors import ContainerError, GpuNotFoundError

_spec = importlib.util.spec_from_file_location("driver_tree", Path(__file__).with_name("driver_tree.py"))
driver_tree = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driver_tree)

CONTROL = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return driver_tree.make(tmp_path)


def paths(edits: dict) -> list[str]:
    return [node["path"] for node in edits["deviceNodes"]]


def test_all_gpus_with_the_instances_of_a_partitioned_one(root: Path) -> None:
    found = cdi.inject(root=root, nvml=driver_tree.nvml())
    caps = ["/dev/nvidia-caps/nvidia-cap12", "/dev/nvidia-caps/nvidia-cap13"]
    assert paths(found.edits) == [*CONTROL, "/dev/nvidia0", "/dev/nvidia3", *caps]
    assert found.driver == driver_tree.VERSION
    assert found.reason is None


def test_one_gpu_and_no_node_of_the_other(root: Path) -> None:
    found = cdi.inject(mode="ids", ids=["0"], root=root, nvml=driver_tree.nvml())
    assert paths(found.edits) == [*CONTROL, "/dev/nvidia0"]
    assert found.edits["env"] == [f"NVIDIA_VISIBLE_DEVICES={driver_tree.FIRST}"]


def test_a_library_is_mounted_under_each_of_its_names(root: Path) -> None:
    found = cdi.inject(root=root, nvml=driver_tree.nvml())
    directory = nvidia.library_directory()
    cuda = str(root / driver_tree.LIBRARIES / f"libcuda.so.{driver_tree.VERSION}")
    targets = [mount["containerPath"] for mount in found.edits["mounts"] if mount["hostPath"] == cuda]
    names = ("libcuda.so", "libcuda.so.1", f"libcuda.so.{driver_tree.VERSION}")
    assert targets == [str(directory / name) for name in names]


def test_what_is_mounted_cannot_be_written_or_raise_privileges(root: Path) -> None:
    found = cdi.inject(root=root, nvml=driver_tree.nvml())
    assert found.edits["mounts"]
    for mount in found.edits["mounts"]:
        assert {"ro", "nosuid", "nodev"} <= set(mount["options"])


def test_the_drivers_socket_is_mounted_where_there_is_one(root: Path) -> None:
    driver_tree.write(root / "run/nvidia-persistenced/socket")
    found = cdi.inject(root=root, nvml=driver_tree.nvml())
    sockets = [mount for mount in found.edits["mounts"] if mount["containerPath"].startswith("/run")]
    assert [mount["containerPath"] for mount in sockets] == ["/run/nvidia-persistenced/socket"]
    assert "noexec" in sockets[0]["options"]


def test_no_graphics_libraries_unasked(root: Path) -> None:
    found = cdi.inject(root=root, nvml=driver_tree.nvml())
    assert not [mount for mount in found.edits["mounts"] if "glcore" in mount["hostPath"]]


def test_auto_without_a_driver_gives_the_reason(tmp_path: Path) -> None:
    found = cdi.inject(root=tmp_path)
    assert found == cdi.Injection(reason="the kernel runs no NVIDIA driver")


def test_asking_without_a_driver_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GpuNotFoundError):
        cdi.inject(mode="all", root=tmp_path)


def test_none_asks_nobody(root: Path) -> None:
    (root / "proc/driver/nvidia/version").write_text("damaged")
    assert cdi.inject(mode="none", root=root).edits == {}


def test_auto_does_not_pass_over_a_damaged_driver(root: Path) -> None:
    (root / driver_tree.LIBRARIES / f"libcuda.so.{driver_tree.VERSION}").unlink()
    with pytest.raises(ContainerError, match="libraries of version"):
        cdi.inject(root=root, nvml=driver_tree.nvml())


def test_the_specification_names_devices_by_index_uuid_and_all(root: Path) -> None:
    driver = nvidia.find_driver(driver_tree.VERSION, root)
    found = cdi.specification(driver, nvidia.gpus(root), root)
    assert (found["cdiVersion"], found["kind"]) == ("0.6.0", "nvidia.com/gpu")
    assert [device["name"] for device in found["devices"]] == [
        "0",
        driver_tree.FIRST,
        "1",
        driver_tree.SECOND,
        "all",
    ]
    assert paths(cdi.container_edits(found, ["all"])) == [*CONTROL, "/dev/nvidia0", "/dev/nvidia3"]


def test_edits_of_two_devices_have_each_node_once(root: Path) -> None:
    driver = nvidia.find_driver(driver_tree.VERSION, root)
    found = cdi.specification(driver, nvidia.gpus(root), root)
    assert paths(cdi.container_edits(found, ["0", "all"])) == [*CONTROL, "/dev/nvidia0", "/dev/nvidia3"]


def test_a_name_that_is_not_in_the_specification(root: Path) -> None:
    driver = nvidia.find_driver(driver_tree.VERSION, root)
    with pytest.raises(KeyError):
        cdi.container_edits(cdi.specification(driver, nvidia.gpus(root), root), ["9"])
