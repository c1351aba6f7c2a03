from __future__ import annotations

import platform

from mlenv.resolve import host

VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 12.2.0
"""
OPEN_VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.26  Release Build  (u@h)\n"
INFORMATION = "Model: \t\t Tesla K80\nIRQ:   \t\t 16\nGPU UUID: \t GPU-1234\nBus Location: \t 0000:00:04.0\n"


def test_the_driver_is_read_from_proc_for_both_kinds_of_module():
    assert host.parse_driver_version(VERSION) == "535.104.05"
    assert host.parse_driver_version(OPEN_VERSION) == "570.26"
    assert host.parse_driver_version("") is None


def test_a_gpu_is_read_from_proc():
    assert host.parse_gpu_information(INFORMATION) == host.Gpu(name="Tesla K80", uuid="GPU-1234")


def test_nvidia_smi_tells_capability_and_memory():
    text = "GPU-1, NVIDIA H200, 9.0, 143771, 570.86.15\nGPU-2, Old Card, [N/A], [N/A], 570.86.15\n"
    driver, gpus = host.parse_smi(text)
    assert driver == "570.86.15"
    assert gpus == (
        host.Gpu(name="NVIDIA H200", uuid="GPU-1", compute_capability="9.0", memory=143771 << 20),
        host.Gpu(name="Old Card", uuid="GPU-2"),
    )
    assert host.parse_smi("No devices were found\n") is None


def test_the_facts_are_those_of_this_machine():
    facts = host.facts()
    assert facts.architecture == host.ARCHITECTURES.get(platform.machine(), platform.machine())
    assert facts.glibc is None or facts.glibc.split(".")[0] == "2"
