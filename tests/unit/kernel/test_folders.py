"""Paths of the host and of the container, through its bind mounts."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mlenv.kernel.folders import container_path, host_path

CONFIG = {
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/home/ada/project", "source": "/home/ada/project", "options": ["rbind"]},
        {"destination": "/data", "source": "/srv/data", "type": "bind"},
        {"destination": "/data/raw", "source": "/mnt/raw", "options": ["bind", "ro"]},
    ]
}


def test_a_folder_below_a_mount_is_found_on_both_sides():
    assert container_path(CONFIG, Path("/home/ada/project/a b")) == PurePosixPath("/home/ada/project/a b")
    assert container_path(CONFIG, Path("/srv/data/x")) == PurePosixPath("/data/x")
    assert host_path(CONFIG, PurePosixPath("/data/x")) == Path("/srv/data/x")


def test_the_deepest_mount_wins():
    assert host_path(CONFIG, PurePosixPath("/data/raw/1")) == Path("/mnt/raw/1")


def test_what_is_not_mounted_has_no_path_there():
    assert container_path(CONFIG, Path("/home/ada")) is None
    assert container_path(CONFIG, Path("/home/ada/project2")) is None
    assert host_path(CONFIG, PurePosixPath("/proc/1")) is None
