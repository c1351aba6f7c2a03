"""Which variables of the host reach a kernel."""

from __future__ import annotations

import pytest

from mlenv.kernel.variables import Variables, container_variables, kernel_variables


def test_a_variable_of_the_users_own_passes():
    assert kernel_variables({"WANDB_PROJECT": "t"}, container={}, kernelspec={}).inherited == {
        "WANDB_PROJECT": "t"
    }


@pytest.mark.parametrize(
    "name",
    ["PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_RUNTIME_DIR",
     "TMPDIR", "JUPYTER_TOKEN", "SSL_CERT_FILE", "CUDA_VISIBLE_DEVICES", "LC_ALL",
     "MLENV_HOME", "JPY_API_TOKEN"],
)  # fmt: skip
def test_a_variable_about_the_host_does_not_pass(name):
    assert kernel_variables({name: "x"}, container={}, kernelspec={}).inherited == {}


def test_container_wins_over_host_and_kernelspec_over_both():
    host = {"OMP_NUM_THREADS": "64", "MODE": "host"}
    container = {"OMP_NUM_THREADS": "4", "MODE": "container"}
    passed = kernel_variables(host, container=container, kernelspec={"MODE": "kernel", "MLENV_HOME": "/h"})
    assert passed.inherited == {}
    assert passed.explicit == {"MODE": "kernel", "JPY_PARENT_PID": "1"}


def test_parent_watch_is_off_whatever_the_host_says():
    """ipykernel ends itself within a second when it is given a pid that means nothing in its container."""
    passed = kernel_variables({"JPY_PARENT_PID": "4711"}, container={}, kernelspec={})
    assert passed == Variables(inherited={}, explicit={"JPY_PARENT_PID": "1"})


def test_a_spec_never_sets_the_environment_of_a_process_of_the_host():
    """`kernel: {env: {LD_PRELOAD: …}}` of a stranger's spec would otherwise run outside the container."""
    passed = kernel_variables({}, container={}, kernelspec={"LD_PRELOAD": "/project/evil.so"})
    assert passed.inherited == {}
    assert passed.explicit["LD_PRELOAD"] == "/project/evil.so"


def test_container_variables_keep_equal_signs_in_values():
    assert container_variables({"process": {"env": ["A=b=c", "E="]}}) == {"A": "b=c", "E": ""}
