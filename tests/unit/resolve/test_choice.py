from __future__ import annotations

import dataclasses

import pytest

from mlenv.errors import ImpossibleCombinationError
from mlenv.resolve.choice import (
    Request,
    check_cuda_alone,
    choose_build,
    choose_system,
    min_driver,
    runs_on,
)
from mlenv.resolve.host import Gpu
from mlenv.resolve.matrix import load

BASES = ("debian:13", "debian:12", "debian:11")
BLANK = Request(
    pytorch=None,
    cuda=None,
    cudnn=None,
    python=None,
    base=None,
    bases=BASES,
    where=lambda key: f"envs/x.yaml:{len(key)}",
)
A100 = Gpu(name="NVIDIA A100-SXM4-40GB", compute_capability="8.0")
H100 = Gpu(name="NVIDIA H100", compute_capability="9.0")
K80 = Gpu(name="Tesla K80")
NEW_DRIVER = "999.0"


@pytest.fixture(scope="module")
def matrix():
    return load()


def ask(matrix, **asked):
    request = dataclasses.replace(BLANK, **asked)
    build, reasons = choose_build(request, matrix)
    system, more = choose_system(request, build.release, matrix)
    return build, system, {reason.subject: reason for reason in (*reasons, *more)}


def refused(matrix, **asked):
    with pytest.raises(ImpossibleCombinationError) as caught:
        ask(matrix, **asked)
    assert caught.value.exit_status == 2
    return caught.value


# --- release, variant, Python, base


@pytest.mark.parametrize(
    ("asked", "version", "system"),
    [
        ({"pytorch": "1.7", "cuda": "10.1", "python": "3.8"}, "1.7.1+cu101", ("3.8", "debian:13", True)),
        ({"pytorch": "1.7", "cuda": "10.2"}, "1.7.1", ("3.9", "debian:11", False)),
        ({"pytorch": "1.7.0", "cuda": "10.2"}, "1.7.0", ("3.8", "debian:13", True)),
        ({"pytorch": "2.13.0", "cuda": "cpu", "python": "3.11"}, "2.13.0+cpu", ("3.11", "debian:12", False)),
        ({"pytorch": "2.13.0+cpu", "python": "3.11"}, "2.13.0+cpu", ("3.11", "debian:12", False)),
        ({"pytorch": "2.13"}, "2.13.0+cpu", ("3.13", "debian:13", False)),
        ({"pytorch": ">=2.1,<2.4", "cuda": "12.1"}, "2.3.1", ("3.11", "debian:12", False)),
        ({"pytorch": ">=1.5", "python": "3.8", "cuda": "10.1"}, "1.8.1+cu101", ("3.8", "debian:13", True)),
        ({"pytorch": "2", "python": "3.8", "cuda": "cpu"}, "2.4.1+cpu", ("3.8", "debian:13", True)),
        ({"pytorch": "1.7", "cuda": "10.2", "base": "debian:12"}, "1.7.1", ("3.9", "debian:12", True)),
    ],
)
def test_the_newest_that_fits_is_taken(matrix, asked, version, system):
    build, found, _ = ask(matrix, **asked)
    assert build.local_version == version
    assert (found.python, found.base, found.standalone) == system


def test_without_pytorch_the_newest_base_decides_the_python(matrix):
    system, _ = choose_system(BLANK, None, matrix)
    assert (system.base, system.python, system.standalone) == ("debian:13", "3.13", False)
    old, _ = choose_system(dataclasses.replace(BLANK, python="3.10"), None, matrix)
    assert (old.base, old.python, old.standalone) == ("debian:13", "3.10", True)


def test_cudnn_seven_agrees_with_seven_six_three(matrix):
    _, _, reasons = ask(matrix, pytorch="1.7", cuda="10.1", cudnn="7")
    assert reasons["cudnn"].choice == "7.6.3"
    assert "`cudnn: 7` agrees" in reasons["cudnn"].because


def test_every_rejected_build_is_named_with_why(matrix):
    build, _, reasons = ask(matrix, pytorch="1.7", gpus=(A100,), driver=NEW_DRIVER)
    assert build.local_version == "1.7.1+cu110"
    assert any("CUDA 10.2 cannot run on NVIDIA A100" in line for line in reasons["pytorch"].rejected)


# --- what cannot be


def test_the_tutorials_cudnn_is_refused_with_what_exists_and_the_edit(matrix):
    error = refused(matrix, pytorch="1.7", cuda="10.1", cudnn="7.1")
    assert error.code == "impossible-combination"
    assert error.message == "cuDNN 7.1 was never published for CUDA 10.1"
    assert error.cause.splitlines() == [
        (
            "cuDNN 7.1 was published only as 7.1.1, 7.1.2 and 7.1.3 for CUDA 8.0, 9.0 and 9.1; "
            "7.1.4 for CUDA 8.0, 9.0 and 9.2"
        ),
        (
            "cuDNN for CUDA 10.1 exists as 7.5.0, 7.5.1, 7.6.0, 7.6.1, 7.6.2, 7.6.3, 7.6.4, 7.6.5, 8.0.3 and "
            "8.0.5"
        ),
        "PyTorch 1.7.1 for CUDA 10.1 is built with cuDNN 7.6.3",
    ]
    assert error.hint == 'set `cudnn: "7.6"` in envs/x.yaml:5, or leave the key out'


@pytest.mark.parametrize(
    ("asked", "cause", "hint"),
    [
        ({"pytorch": "9.9"}, "2.15.0, 2.14.1", 'set `pytorch: "2.15.0"` in envs/x.yaml:7'),
        (
            {"pytorch": "1.7", "cuda": "9.0"},
            "cpu, 9.2, 10.1, 10.2 and 11.0",
            'set `cuda: "9.2"` in envs/x.yaml:4',
        ),
        (
            {"pytorch": "1.7", "python": "3.11"},
            "3.6, 3.7, 3.8 and 3.9",
            'set `python: "3.9"` in envs/x.yaml:6',
        ),
        ({"pytorch": "1.7", "cuda": "10.2", "cudnn": "8"}, "with cuDNN 7.6.5", 'set `cudnn: "7.6"`'),
        ({"pytorch": "2.13", "cuda": "cpu", "cudnn": "9"}, "cannot hold", "remove `cudnn`"),
        ({"pytorch": "2.13.0+cu999"}, "cu101", "write one of these"),
        ({"pytorch": "2.13.0+cpu", "cuda": "13.0"}, "the CPU", 'set `cuda: "cpu"`'),
        ({"pytorch": "1.7", "cuda": "10.2", "base": "ubuntu:22.04"}, "debian:13, debian:12", "debian:13"),
    ],
)
def test_what_never_existed_is_refused_with_the_nearest_that_does(matrix, asked, cause, hint):
    error = refused(matrix, **asked)
    assert cause in error.cause
    assert hint in error.hint


# --- GPUs and drivers


@pytest.mark.parametrize(
    ("gpu", "asked", "code", "hint"),
    [
        (A100, {"pytorch": "1.7", "cuda": "10.1"}, "gpu-too-new", 'set `cuda: "11.0"` in envs/x.yaml:4'),
        (
            H100,
            {"pytorch": "1.7", "cuda": "10.1"},
            "gpu-too-new",
            'set `pytorch: "2.0.0"` in envs/x.yaml:7 and `cuda: "11.8"` in envs/x.yaml:4',
        ),
        (K80, {"pytorch": "2.13", "cuda": "13.0"}, "gpu-too-old", 'set `pytorch: "2.3.1"`'),
    ],
)
def test_a_build_without_code_for_the_gpu_is_refused_with_the_nearest_pair(matrix, gpu, asked, code, hint):
    error = refused(matrix, gpus=(gpu,), driver=NEW_DRIVER, **asked)
    assert error.code == code
    assert gpu.name in error.message
    assert hint in error.hint


def test_the_best_build_for_the_gpu_is_found_without_naming_cuda(matrix):
    build, _, _ = ask(matrix, pytorch="2", gpus=(K80,), driver="470.82.01")
    assert build.local_version == "2.3.1+cu118"  # cuDNN 9 of the later +cu118 builds starts at 5.0
    build, _, _ = ask(matrix, pytorch="2.13", gpus=(H100,), driver=NEW_DRIVER)
    assert build.local_version == "2.13.0"  # PyPI's own build comes first


def test_an_old_driver_is_refused_with_the_newest_it_can_run(matrix):
    error = refused(matrix, pytorch="2.15", gpus=(H100,), driver="535.104.05")
    assert error.code == "driver-too-old"
    assert "needs driver 580.65.06 or newer and this machine has 535.104.05" in error.cause
    assert 'set `pytorch: "2.14.1"` in envs/x.yaml:7 and `cuda: "12.6"`' in error.hint


def test_code_for_seven_zero_runs_on_seven_five_and_ptx_counts_only_where_it_was_asked_for(matrix):
    release = next(release for release in matrix.releases if release.version == "1.4.0")
    variant = release.variants["cu101"]
    assert runs_on(dataclasses.replace(variant, sm=(70,), ptx=()), 75, matrix)
    assert not runs_on(dataclasses.replace(variant, sm=(75,), ptx=()), 70, matrix)
    assert runs_on(variant, 86, matrix)
    assert not runs_on(variant, 86, matrix, compiled=True)


def test_from_cuda_11_on_a_driver_of_the_same_major_release_will_do(matrix):
    variants = {tag: variant for release in matrix.releases for tag, variant in release.variants.items()}
    assert min_driver(variants["cu101"], matrix) == "418.39"
    assert min_driver(variants["cu118"], matrix) == "450.80.02"
    assert min_driver(variants["cpu"], matrix) is None


# --- without PyTorch


def test_cuda_without_pytorch_only_requires_a_driver(matrix):
    reason = check_cuda_alone(dataclasses.replace(BLANK, cuda="10.2"), matrix)
    assert reason.choice == "driver >= 440.33"
    with pytest.raises(ImpossibleCombinationError) as caught:
        check_cuda_alone(dataclasses.replace(BLANK, cuda="10.2", driver="418.39"), matrix)
    assert caught.value.code == "driver-too-old"
    with pytest.raises(ImpossibleCombinationError, match=r"never published for CUDA 10\.1"):
        check_cuda_alone(dataclasses.replace(BLANK, cuda="10.1", cudnn="7.1"), matrix)
    with pytest.raises(ImpossibleCombinationError, match=r"no CUDA 10\.9"):
        check_cuda_alone(dataclasses.replace(BLANK, cuda="10.9"), matrix)
    assert check_cuda_alone(BLANK, matrix) is None
