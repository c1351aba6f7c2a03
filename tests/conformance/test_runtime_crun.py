"""The same OCI bundle under crun and under ours gives the same things to see.

crun 1.8 refuses a host whose v2 hierarchy holds a controller beside v1, so it runs where that hierarchy is
not mounted; and it fails where it cannot raise a limit, so the bundles ask for none.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from containers import CORE
from requires import requires

from mlenv.container import config

pytestmark = requires("root", "crun", "overlay")

WITHOUT_HYBRID = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
Both = Callable[..., tuple["subprocess.CompletedProcess[str]", "subprocess.CompletedProcess[str]"]]


def unchanged(_: dict[str, Any]) -> None:
    """Leave the configuration as it is."""


@pytest.fixture
def both(home: Path, busybox_rootfs: Path) -> Both:
    """Run a script in the same bundle under crun and under ours: (theirs, ours)."""

    def run(
        script: str, edit: Callable[[dict[str, Any]], None] = unchanged, args: list[str] | None = None
    ) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
        made = config.runtime_config(
            args=args or ["sh", "-c", script],
            env={"PATH": "/bin", "HOME": "/root"},
            hostname="both",
            network="none",
        )
        made["annotations"] = {}
        made["process"]["rlimits"] = []
        made["root"]["path"] = str(busybox_rootfs)
        edit(made)
        bundle = home / "bundle"
        bundle.mkdir(exist_ok=True)
        (bundle / "config.json").write_text(json.dumps(made))
        theirs = ["crun", "--root", str(home / "crun"), "run", "--bundle", str(bundle), f"crun-{os.getpid()}"]
        ours = [sys.executable, "-I", "-S", str(CORE), "run", "--bundle", str(bundle), f"ours-{os.getpid()}"]
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "text": True,
        }
        return (
            subprocess.run(
                ["unshare", "-m", "sh", "-c", WITHOUT_HYBRID, "sh", *theirs], check=False, **options
            ),
            subprocess.run(ours, check=False, **options),
        )

    return run


def agree(both: Both, script: str, edit: Callable[[dict[str, Any]], None] = unchanged) -> str:
    theirs, ours = both(script, edit)
    assert ours.stdout == theirs.stdout, f"crun: {theirs.stderr}\nours: {ours.stderr}"
    assert ours.returncode == theirs.returncode
    return ours.stdout


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status(both: Both, status: int) -> None:
    theirs, ours = both(f"exit {status}")
    assert (ours.returncode, theirs.returncode) == (status, status)


def test_killed_by_a_signal(both: Both) -> None:
    theirs, ours = both("sh -c 'kill -9 $$'; exit $?")
    assert ours.returncode == theirs.returncode == 137


def test_environment_and_directory(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["process"]["cwd"] = "/etc"
        made["process"]["env"] += ["A=1", "EMPTY=", "B=x=y", "UNICODE=ä"]

    assert "B=x=y" in agree(both, "env | sort; echo ${PWD}; hostname", edit)


def test_user_group_and_umask(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["process"]["user"] = {"uid": 7, "gid": 8, "umask": 0o27, "additionalGids": [50, 60]}

    found = agree(both, "id -u; id -g; id -G; umask; grep -e Groups -e Cap /proc/self/status", edit)
    assert found.splitlines()[:4] == ["7", "8", "8 50 60", "0027"]


def test_capabilities(both: Both) -> None:
    wanted = {
        "CapEff:": 1,
        "CapPrm:": 1 | 1 << 5,
        "CapBnd:": 1 | 1 << 5 | 1 << 13,
        "CapInh:": 1,
        "CapAmb:": 0,
    }

    def edit(made: dict[str, Any]) -> None:
        made["process"]["user"] = {"uid": 0, "gid": 0}
        made["process"]["capabilities"] = {
            "effective": ["CAP_CHOWN"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
            "inheritable": ["CAP_CHOWN"],
            "ambient": [],
        }

    found = dict(line.split() for line in agree(both, "grep Cap /proc/self/status", edit).splitlines())
    assert int(found["CapBnd:"], 16) == wanted["CapBnd:"]


def test_ambient_capabilities_reach_another_user(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["process"]["user"] = {"uid": 7, "gid": 8}
        names = ["CAP_NET_BIND_SERVICE"]
        made["process"]["capabilities"] = dict.fromkeys(
            ("effective", "permitted", "bounding", "inheritable", "ambient"), names
        )

    assert "0000000000000400" in agree(both, "grep Cap /proc/self/status", edit)


@pytest.mark.parametrize("no_new", [True, False])
def test_no_new_privileges_and_seccomp(both: Both, *, no_new: bool) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["process"]["noNewPrivileges"] = no_new

    assert f"NoNewPrivs:\t{int(no_new)}" in agree(both, "grep -e NoNew -e Seccomp: /proc/self/status", edit)


def test_limits_of_resources(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["process"]["rlimits"] = [
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_FSIZE", "soft": 1 << 20, "hard": 1 << 20},
        ]

    assert agree(both, "ulimit -Sn; ulimit -Hn; ulimit -c; ulimit -f", edit).split()[:3] == [
        "100",
        "200",
        "0",
    ]


def mount_lines(output: str) -> dict[str, tuple[str, str, frozenset[str]]]:
    """By target: kind, filesystem and options of the last mount there."""
    found = {}
    for line in output.splitlines():
        source, target, kind, options, *_ = line.split()
        found[target] = (source, kind, frozenset(options.split(",")))
    return found


def test_mounts_and_their_options(both: Both) -> None:
    theirs, ours = both("cat /proc/self/mounts")
    their, our = mount_lines(theirs.stdout), mount_lines(ours.stdout)
    own = ("/", "/sys/fs/cgroup")
    made_readonly = config.READONLY_PATHS
    names = [name for name in our if not name.startswith(own[1]) and name != "/" and name in their]
    assert {"/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/proc/sys", "/proc/bus"} <= set(
        names
    )
    for name in names:
        if name.startswith(("/proc/", "/sys/")) and our[name][1] in ("tmpfs", "devtmpfs"):
            continue  # a mask: what covers it is each runtime's business, that it is covered is checked below
        assert our[name][1] == their[name][1], name
        if name in made_readonly:  # there crun drops what the mount below had, ours keeps it
            assert our[name][2] >= their[name][2], name
        else:
            assert our[name][2] == their[name][2], name


def test_masks_and_read_only_paths(both: Both) -> None:
    script = (
        "cd /proc; for p in kcore keys timer_list interrupts; do head -c 1 $p 2>/dev/null | wc -c; done;"
        "ls /sys/firmware /proc/acpi 2>/dev/null | grep -v : | grep -c .;"
        "for p in /proc/sys/kernel/hostname /proc/sysrq-trigger; do (echo x > $p) 2>/dev/null; echo $?; done"
    )
    assert agree(both, script).split() == ["0", "0", "0", "0", "0", "1", "1"]


def test_devices(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["linux"]["devices"] = [
            {
                "type": "c",
                "path": "/dev/fuse",
                "major": 10,
                "minor": 229,
                "fileMode": 0o640,
                "uid": 7,
                "gid": 8,
            }
        ]

    nodes = "null zero full random urandom tty fuse"
    script = f"cd /dev; stat -c '%n %F %t:%T %a %u:%g' {nodes}; readlink fd ptmx stdin"
    assert "fuse character special file a:e5 640 7:8" in agree(both, script, edit)


def test_bind_mounts(both: Both, home: Path) -> None:
    source = home / "source"
    (source / "sub").mkdir(parents=True)
    (source / "file").write_text("content\n")

    def edit(made: dict[str, Any]) -> None:
        made["mounts"] += [
            {
                "destination": "/tmp",
                "type": "bind",
                "source": str(source),
                "options": ["rbind", "ro", "nosuid"],
            },
            {
                "destination": "/root",
                "type": "bind",
                "source": str(source),
                "options": ["bind", "noexec", "nodev"],
            },
        ]

    script = "cat /tmp/file; touch /tmp/x 2>/dev/null; echo $?; touch /root/y; echo $?; "
    script += "grep -e ' /tmp ' -e ' /root ' /proc/self/mounts"
    found = agree(both, script, edit)
    assert found.splitlines()[:3] == ["content", "1", "0"]


def test_tmpfs_options(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["mounts"].append(
            {
                "destination": "/tmp",
                "type": "tmpfs",
                "source": "t",
                "options": ["size=1m", "mode=1770", "noatime"],
            }
        )

    assert "size=1024k" in agree(both, "grep ' /tmp ' /proc/self/mounts; stat -c %a /tmp", edit)


def test_kernel_parameters(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["linux"]["sysctl"] = {"kernel.shmmni": "123", "net.ipv4.ip_forward": "1"}

    assert agree(both, "cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_forward", edit).split() == [
        "123",
        "1",
    ]


def test_a_read_only_root(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["root"]["readonly"] = True

    assert agree(both, "touch /x 2>/dev/null; echo $?; touch /dev/shm/x; echo $?", edit).split() == ["1", "0"]


@pytest.mark.parametrize("program", ["unshare -m true", "unshare -U true", "mount -t proc p /tmp"])
def test_what_the_filter_forbids(both: Both, program: str) -> None:
    theirs, ours = both(f"{program} 2>/dev/null")
    assert bool(ours.returncode) is bool(theirs.returncode) is True


def test_out_of_memory_score(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["process"]["oomScoreAdj"] = 500

    assert agree(both, "cat /proc/self/oom_score_adj", edit).strip() == "500"


def test_limits_of_control_groups(both: Both) -> None:
    def edit(made: dict[str, Any]) -> None:
        made["linux"]["resources"] = {
            "memory": {"limit": 64 << 20, "reservation": 32 << 20},
            "cpu": {"shares": 512, "quota": 50000, "period": 100000},
            "pids": {"limit": 44},
        }

    script = (
        "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes memory/memory.soft_limit_in_bytes"
        " cpu/cpu.shares cpu/cpu.cfs_quota_us pids/pids.max 2>/dev/null;"
        " cat memory.max memory.low cpu.max cpu.weight pids.max 2>/dev/null"
    )
    assert "44" in agree(both, script, edit).split()


def test_a_missing_program(both: Both) -> None:
    theirs, ours = both("", args=["/no/such"])
    assert theirs.returncode != 0
    assert ours.returncode == 127


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("linux.intelRdt", {"closID": "x"}),
        ("linux.personality", {"domain": "LINUX"}),
        ("linux.timeOffsets", {"monotonic": {"secs": 1}}),
        ("process.selinuxLabel", "x"),
        ("process.apparmorProfile", "x"),
        ("hooks", {"prestart": []}),
        ("windows", {}),
    ],
)
def test_what_is_not_carried_out_is_refused(both: Both, place: str, value: object) -> None:
    def edit(made: dict[str, Any]) -> None:
        target = made
        *parents, last = place.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = copy.deepcopy(value)

    ours = both("true", edit)[1]
    assert ours.returncode == 125
    assert f"{place}: not supported" in ours.stderr
