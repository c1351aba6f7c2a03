"""Kernel parameters of a bundle: those of its own namespaces, never the host's."""

from __future__ import annotations

from typing import Any

import pytest

from mlenv.container import bundle, config


def faults(parameters: dict[str, Any], **without: str) -> list[str]:
    made = config.runtime_config(args=["true"], env={}, network="none")
    made["linux"]["sysctl"] = parameters
    for entry in made["linux"]["namespaces"]:
        if entry["type"] in without:
            entry["path"] = without[entry["type"]]
    return bundle.check(made)


@pytest.mark.parametrize(
    "key",
    ["kernel.shmmni", "kernel.sem", "fs.mqueue.msg_max", "kernel.domainname", "net.ipv4.ip_forward"],
)
def test_the_container_s_own(key: str) -> None:
    assert faults({key: "1"}) == []


@pytest.mark.parametrize(
    "key",
    [
        "kernel.printk_delay",
        "kernel.core_pattern",
        "vm.swappiness",
        "fs.file-max",
        "kernel.msgmaxx",
        "net/../kernel.printk_delay",
        "",
    ],
)
def test_the_host_s_are_refused(key: str) -> None:
    assert faults({key: "1"}) == [f"linux.sysctl.{key}: belongs to the host, not to a container"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [("net.core.somaxconn", "network"), ("kernel.shmmax", "ipc"), ("kernel.domainname", "uts")],
)
def test_a_joined_namespace_is_another_s(key: str, kind: str) -> None:
    assert faults({key: "1"}, **{kind: "/proc/1/ns/x"}) == [
        f"linux.sysctl.{key}: needs a {kind} namespace of the container's own"
    ]


def test_a_value_is_text() -> None:
    assert faults({"kernel.shmmni": 1}) == ["linux.sysctl.kernel.shmmni: must be a string"]
