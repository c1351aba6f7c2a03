"""The texts of options and what they mean."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from mlenv.cli import options, run
from mlenv.container.config import Mount, Port, Resources
from mlenv.errors import UsageError
from mlenv.launch.local import Options


def test_ports_bind_loopback_unless_told(tmp_path):
    assert options.ports(["8097:80", "192.0.2.1:1:2"]) == [
        Port(host_ip="127.0.0.1", host_port=8097, container_port=80, protocol="tcp"),
        Port(host_ip="192.0.2.1", host_port=1, container_port=2, protocol="tcp"),
    ]


@pytest.mark.parametrize("text", ["", "a:b", "1:70000", "1:2:3:4"])
def test_a_bad_port_names_itself(text):
    with pytest.raises(UsageError, match="is no port mapping"):
        options.ports([text])


def test_volumes(tmp_path):
    assert options.volume(f"{tmp_path}:/data:ro") == Mount(
        source=tmp_path, target=PurePosixPath("/data"), readonly=True
    )
    assert options.volume(f"{tmp_path}:/data") == Mount(
        source=tmp_path, target=PurePosixPath("/data"), readonly=False
    )


@pytest.mark.parametrize("text", ["x", "x:", "a:b:rx", "{tmp}/missing:/data", "{tmp}:relative"])
def test_a_bad_volume_is_a_usage_error(text, tmp_path):
    with pytest.raises(UsageError):
        options.volume(text.format(tmp=tmp_path))


def test_variables_come_from_the_text_or_the_host(monkeypatch):
    monkeypatch.setenv("HELD", "here")
    monkeypatch.delenv("NOT_HELD", raising=False)
    assert options.environment_variables(["A=1=2", "HELD", "NOT_HELD", "EMPTY="]) == {
        "A": "1=2",
        "HELD": "here",
        "EMPTY": "",
    }


@pytest.mark.parametrize(
    ("text", "count"), [("1GB", 10**9), ("1GiB", 2**30), ("512m", 512 * 2**20), ("7", 7)]
)
def test_sizes(text, count):
    assert options.size(text, "--memory") == count


def test_a_bad_size_names_its_option():
    with pytest.raises(UsageError, match=r"--memory lots"):
        options.size("lots", "--memory")


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_bad_number_of_processors_is_a_usage_error(count):
    with pytest.raises(UsageError, match="is no number of processors"):
        options.cpus(count)


@pytest.mark.parametrize(("asked", "limit"), [(None, 2.0), (1.5, 1.5), (0.0, None)])
def test_no_processors_are_no_limit(asked, limit):
    """As Docker's: `--cpus 0` takes away what the spec says too."""
    words = dict.fromkeys(
        ("memory", "pids_limit", "shm_size", "workdir", "user", "tty", "network", "read_only")
    )
    words |= {"cpus": asked, "env": (), "volume": (), "publish": (), "gpus": None}
    defaults = Options(resources=Resources(cpus=2.0))
    assert run._options(defaults, (), words).resources.cpus == limit
