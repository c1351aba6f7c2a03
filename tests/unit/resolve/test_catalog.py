"""The locks that ship beside their specs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlenv.lock import canonical
from mlenv.lock.file import read_lock
from mlenv.resolve import debian, tags
from mlenv.spec.reader import read_spec
from mlenv.spec.sources import lock_path

ENVS = Path(__file__).parents[3] / "envs"
LOCKED = ("pytorch-1.7-cu102", "pytorch-2.13-cpu", "quickstart")


@pytest.fixture(params=LOCKED)
def pair(request):
    spec = ENVS / f"{request.param}.yaml"
    return read_spec(spec), read_lock(lock_path(spec))


def test_every_spec_of_the_catalog_is_valid():
    specs = sorted(ENVS.glob("*.yaml"))
    assert [read_spec(path).name for path in specs] == [path.stem for path in specs]


def test_a_lock_belongs_to_its_spec_and_is_canonical(pair):
    spec, lock = pair
    assert lock.spec == spec.digest, f"run `mlenv lock {spec.name}`"
    path = ENVS / f"{spec.name}.lock.json"
    assert path.read_bytes() == canonical.dump(lock)
    assert not re.search(rb"https?:|file:|mirror", path.read_bytes())


def test_a_lock_holds_what_runs_a_kernel_on_its_base(pair):
    spec, lock = pair
    names = [wheel.name for wheel in lock.wheels]
    assert {"ipykernel", "pip"} <= set(names)
    assert names == sorted(names)
    assert lock.python.version == debian.python_version(
        lock.base.packages, lock.python.version.rpartition(".")[0]
    )
    ranks = tags.supported(lock.python.version, lock.platform.architecture, lock.platform.glibc)
    assert all(tags.best([wheel.filename], ranks) for wheel in lock.wheels)
    installed = {package.name for package in lock.base.packages}
    assert {"apt", "bash", "ca-certificates", "libc6", "procps", "python3"} <= installed
    assert all(package.path.startswith("pool/") for package in lock.base.packages)
    assert spec.python is None or lock.python.version.startswith(spec.python)


def test_the_pytorch_locks_pin_the_builds_they_name():
    old, cpu = (read_lock(ENVS / f"{name}.lock.json") for name in LOCKED[:2])
    wheels = {wheel.name: wheel for wheel in old.wheels}
    assert (wheels["torch"].version, old.pytorch.cuda, old.pytorch.cudnn) == ("1.7.1", "10.2", "7.6.5")
    assert int(wheels["numpy"].version.split(".")[0]) < 2
    assert {wheel.name: wheel.version for wheel in cpu.wheels}["torch"] == "2.13.0+cpu"
