"""Kernelspecs as files that Jupyter itself can read."""

from __future__ import annotations

import json
import sys

import pytest
from jupyter_client.kernelspec import KernelSpec

from mlenv.errors import KernelError
from mlenv.jupyter.kernelspecs import EnvironmentKernelSpecManager
from mlenv.kernel import kernelspec
from mlenv.kernel.provisioner import MlenvProvisioner


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLENV_HOME", str(tmp_path))
    return tmp_path


def test_jupyter_reads_what_we_write(home):
    directory = kernelspec.install(
        "train", "PyTorch 1.7 (CUDA 10.1)", lock="sha256:1", env={"A": "1"}, metadata={"cull_idle_timeout": 5}
    )
    spec = KernelSpec.from_resource_dir(str(directory))
    assert (spec.display_name, spec.language, spec.interrupt_mode) == (
        "PyTorch 1.7 (CUDA 10.1)",
        "python",
        "signal",
    )
    assert spec.argv == [sys.executable, "-m", "mlenv.kernel", "launch", "train", "-f", "{connection_file}"]
    assert spec.env == {"A": "1", "MLENV_HOME": str(home)}
    assert spec.metadata["cull_idle_timeout"] == 5
    config = spec.metadata["kernel_provisioner"]["config"]
    provisioner = MlenvProvisioner(kernel_id="1", kernel_spec=spec, **config)
    assert (provisioner.environment, provisioner.lock) == ("train", "sha256:1")


def test_only_environments_are_listed_and_can_be_started():
    kernelspec.install("train", "Train", lock="")
    manager = EnvironmentKernelSpecManager()
    assert list(manager.find_kernel_specs()) == ["train"]
    kernelspec.install("other", "Other", lock="")
    assert sorted(manager.get_all_specs()) == ["other", "train"]
    with pytest.raises(KeyError, match="python3"):
        manager.get_kernel_spec("python3")


def test_installing_again_replaces_and_leaves_no_temporary_file(home):
    kernelspec.install("train", "old", lock="sha256:1")
    directory = kernelspec.install("train", "new", lock="sha256:2")
    assert sorted(entry.name for entry in directory.iterdir()) == ["kernel.json", "logo-svg.svg"]
    assert [(kernel.display_name, kernel.lock) for kernel in kernelspec.installed()] == [("new", "sha256:2")]


def test_remove_says_whether_there_was_one():
    kernelspec.install("train", "Train", lock="")
    assert kernelspec.remove("train")
    assert not kernelspec.remove("train")
    assert kernelspec.installed() == ()


@pytest.mark.parametrize("name", ["", "a b", "ü", "../up", "..", ".hidden"])
def test_a_name_jupyter_refuses_is_refused(name, home):
    with pytest.raises(KernelError) as caught:
        kernelspec.install(name, "x", lock="")
    assert caught.value.code == "invalid-kernel-name"
    assert not kernelspec.kernels_dir().exists()


def test_an_unknown_interrupt_mode_is_refused():
    with pytest.raises(KernelError, match="shout"):
        kernelspec.install("train", "x", lock="", interrupt_mode="shout")


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"display_name": "x"})])
def test_a_damaged_kernelspec_is_reported_with_its_file(text):
    file = kernelspec.install("train", "Train", lock="") / "kernel.json"
    file.write_text(text)
    with pytest.raises(KernelError) as caught:
        kernelspec.installed()
    assert str(file) in caught.value.message
