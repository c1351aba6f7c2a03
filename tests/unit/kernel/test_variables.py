"""Which variables of the host reach a kernel."""

from __future__ import annotations

import pytest

from mlenv.kernel.variables import container_variables, kernel_variables


def test_a_variable_of_the_users_own_passes():
    assert kernel_variables({"WANDB_PROJECT": "t"}, container={}, kernelspec={})["WANDB_PROJECT"] == "t"


@pytest.mark.parametrize(
    "name",
    ["PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_RUNTIME_DIR",
     "TMPDIR", "JUPYTER_TOKEN", "SSL_CERT_FILE", "CUDA_VISIBLE_DEVICES", "LC_ALL", "MLENV_HOME", "JPY_API_TOKEN"],
)  # fmt: skip
def test_a_variable_about_the_host_does_not_pass(name):
    assert name not in kernel_variables({name: "x"}, container={}, kernelspec={})


def test_container_wins_over_host_and_kernelspec_over_both():
    host = {"OMP_NUM_THREADS": "64", "MODE": "host"}
    container = {"OMP_NUM_THREADS": "4", "MODE": "container"}
    passed = kernel_variables(host, container=container, kernelspec={"MODE": "kernel", "MLENV_HOME": "/h"})
    assert passed == {"MODE": "kernel", "JPY_PARENT_PID": "1"}


def test_parent_watch_is_off_whatever_the_host_says():
    """ipykernel ends itself within a second when it is given a pid that means nothing in its container."""
    assert kernel_variables({"JPY_PARENT_PID": "4711"}, container={}, kernelspec={})["JPY_PARENT_PID"] == "1"


def test_container_variables_keep_equal_signs_in_values():
    assert container_variables({"process": {"env": ["A=b=c", "E="]}}) == {"A": "b=c", "E": ""}
