"""GPUs and driver files of a host that is laid out in a directory."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from requires import requires

from mlenv.container.gpu import nvidia
from mlenv.errors import ContainerError, GpuNotFoundError

_spec = importlib.util.spec_from_file_location("driver_tree", Path(__file__).with_name("driver_tree.py"))
driver_tree = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driver_tree)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return driver_tree.make(tmp_path)


def test_the_kernel_says_the_drivers_version(root: Path) -> None:
    assert nvidia.driver_version(root) == driver_tree.VERSION


def test_the_open_kernel_modules_say_it_in_other_words(tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x)  Thu Jan\n"
    driver_tree.write(tmp_path / "proc/driver/nvidia/version", text)
    assert nvidia.driver_version(tmp_path) == "570.86.15"


def test_the_module_says_it_where_proc_is_hidden(tmp_path: Path) -> None:
    driver_tree.write(tmp_path / "sys/module/nvidia/version", "570.86.15\n")
    assert nvidia.driver_version(tmp_path) == "570.86.15"


def test_a_host_without_the_driver(tmp_path: Path) -> None:
    assert nvidia.driver_version(tmp_path) is None
    assert nvidia.gpus(tmp_path) == ()


def test_gpus_of_proc(root: Path) -> None:
    found = nvidia.gpus(root)
    assert [(gpu.index, gpu.minor, gpu.uuid) for gpu in found] == [
        (0, 0, driver_tree.FIRST),
        (1, 3, driver_tree.SECOND),
    ]
    assert {gpu.memory for gpu in found} == {None}


def test_nvml_knows_more(root: Path) -> None:
    first, second = nvidia.gpus(root, nvml=driver_tree.nvml())
    assert (first.memory, first.compute_capability, first.mig) == (40 << 30, "8.0", False)
    assert (second.minor, second.bus_id, second.mig) == (3, "00000000:41:00.0", True)


def test_proc_answers_where_nvml_is_missing(root: Path) -> None:
    library_not_found = 12
    assert nvidia.gpus(root, nvml=driver_tree.nvml(failure=library_not_found)) == nvidia.gpus(root)


def test_a_driver_that_was_updated_but_not_loaded_is_an_error(root: Path) -> None:
    with pytest.raises(ContainerError, match="updated but not loaded") as failure:
        nvidia.gpus(root, nvml=driver_tree.nvml(failure=18))
    assert driver_tree.VERSION in failure.value.cause


def test_libraries_of_the_kernels_version_alone(root: Path) -> None:
    driver = nvidia.find_driver(driver_tree.VERSION, root)
    assert [(library.host_path.name, library.names) for library in driver.libraries] == [
        (
            f"libcuda.so.{driver_tree.VERSION}",
            ("libcuda.so", "libcuda.so.1", f"libcuda.so.{driver_tree.VERSION}"),
        ),
        (
            f"libnvidia-nvvm.so.{driver_tree.VERSION}",
            ("libnvidia-nvvm.so.4", f"libnvidia-nvvm.so.{driver_tree.VERSION}"),
        ),
        (
            f"libnvidia-ml.so.{driver_tree.VERSION}",
            ("libnvidia-ml.so.1", f"libnvidia-ml.so.{driver_tree.VERSION}"),
        ),
    ]
    assert [path.name for path in driver.programs] == ["nvidia-smi"]


def test_utility_alone(root: Path) -> None:
    driver = nvidia.find_driver(driver_tree.VERSION, root, capabilities=["utility"])
    assert [library.host_path.name for library in driver.libraries] == [
        f"libnvidia-ml.so.{driver_tree.VERSION}"
    ]


def test_libraries_of_another_version_than_the_kernels(root: Path) -> None:
    with pytest.raises(ContainerError, match=r"libraries of version 999\.1 are missing") as failure:
        nvidia.find_driver("999.1", root)
    assert failure.value.code == "driver-incomplete"


def test_soname_of_a_library_nobody_made_for_the_test() -> None:
    path = {"PATH": "/sbin:/usr/sbin"}
    done = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False, env=path)
    paths = [line.split(" => ")[1] for line in done.stdout.splitlines() if "libc.so.6 (libc6,x86-64" in line]
    if not paths:
        pytest.skip("needs libc: no 64-bit libc.so.6 is listed")
    assert nvidia.soname(Path(paths[0])) == "libc.so.6"


def test_soname_of_what_is_no_library(tmp_path: Path) -> None:
    assert nvidia.soname(driver_tree.write(tmp_path / "libx.so", b"INPUT(libc.so.6)")) is None


class TestSelection:
    @pytest.fixture
    def two(self, root: Path) -> tuple[nvidia.Gpu, ...]:
        return nvidia.gpus(root, nvml=driver_tree.nvml())

    @pytest.mark.parametrize(
        ("options", "minors"),
        [
            ({"mode": "auto"}, [0, 3]),
            ({"mode": "all"}, [0, 3]),
            ({"mode": "none"}, []),
            ({"mode": "count", "count": 1}, [0]),
            ({"mode": "count", "count": 1, "memory": 60 << 30}, [3]),
            ({"mode": "auto", "memory": 60 << 30}, [3]),
            ({"mode": "ids", "ids": ["1"]}, [3]),
            ({"mode": "ids", "ids": ["1", "0", "1"]}, [3, 0]),
            ({"mode": "ids", "ids": [driver_tree.SECOND.lower()]}, [3]),
            ({"mode": "ids", "ids": ["bbbb"]}, [3]),
            ({"mode": "ids", "ids": ["GPU-aaaa"]}, [0]),
            ({"mode": "ids", "ids": ["00000000:41:00.0"]}, [3]),
            ({"mode": "ids", "ids": ["41:00.0"]}, [3]),
        ],
    )
    def test_means(self, two: tuple[nvidia.Gpu, ...], options: dict, minors: list[int]) -> None:
        assert [gpu.minor for gpu in nvidia.select(two, **options)] == minors

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "ids", "ids": ["7"]}, "there is no GPU `7`"),
            ({"mode": "ids", "ids": ["GPU-"]}, "`GPU-` is the beginning of several GPUs' names"),
            ({"mode": "count", "count": 3}, "3 GPUs are asked for and there are 2"),
            ({"mode": "all", "memory": 1 << 50}, "all GPUs are asked for and there is none"),
        ],
    )
    def test_of_what_is_not_there_lists_what_is(
        self, two: tuple[nvidia.Gpu, ...], options: dict, message: str
    ) -> None:
        with pytest.raises(GpuNotFoundError) as failure:
            nvidia.select(two, **options)
        assert failure.value.message == message
        assert driver_tree.FIRST in failure.value.cause
        assert driver_tree.SECOND in failure.value.cause

    def test_of_nothing(self) -> None:
        assert nvidia.select((), mode="auto") == ()
        with pytest.raises(GpuNotFoundError) as failure:
            nvidia.select((), mode="ids", ids=["0"])
        assert failure.value.cause == "this host has no NVIDIA GPU that its driver shows"


STUB = """
#include <string.h>
typedef struct { char bus_legacy[16]; unsigned domain, number, device, id, subsystem; char bus[32]; } pci;
typedef struct { unsigned long long total, free, used; } memory;
static char handles[2];
#define OK { return 0; }
int nvmlInit_v2(void) OK
int nvmlInitWithFlags(unsigned f) OK
int nvmlShutdown(void) OK
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = handles + i; return 0; }
static int at(void *h) { return (char *)h - handles; }
int nvmlDeviceGetUUID(void *h, char *s, unsigned n) { strcpy(s, at(h) ? "GPU-bbbb" : "GPU-aaaa"); return 0; }
int nvmlDeviceGetMinorNumber(void *h, unsigned *n) { *n = at(h) ? 3 : 0; return 0; }
int nvmlDeviceGetPciInfo_v3(void *h, pci *p) {
  memset(p, 0, sizeof *p); strcpy(p->bus, at(h) ? "00000000:41:00.0" : "00000000:01:00.0"); return 0; }
int nvmlDeviceGetName(void *h, char *s, unsigned n) { strcpy(s, "NVIDIA Stub"); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, memory *m) { m->total = 1ull << 34; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *h, int *a, int *b) { *a = 9; *b = 0; return 0; }
int nvmlDeviceGetMigMode(void *h, unsigned *c, unsigned *p) { return 3; }
const char *nvmlErrorString(int e) { return "stub"; }
"""

ASK = """
import pynvml
from pathlib import Path
from mlenv.container.gpu import nvidia
print([(gpu.index, gpu.minor, gpu.uuid, gpu.bus_id, gpu.memory, gpu.compute_capability, gpu.mig)
       for gpu in nvidia.gpus(Path("/"), nvml=pynvml)])
"""


@requires("cc")
def test_nvidia_ml_py_over_a_library_in_c(tmp_path: Path) -> None:
    """The fake module above says what the real one says of a library with the same answers."""
    source = driver_tree.write(tmp_path / "stub.c", STUB)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", source], check=True)
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(nvidia.__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip() == str(
        [
            (0, 0, "GPU-aaaa", "00000000:01:00.0", 1 << 34, "9.0", False),
            (1, 3, "GPU-bbbb", "00000000:41:00.0", 1 << 34, "9.0", False),
        ]
    )
