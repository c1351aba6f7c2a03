"""Containers where version 2 is alone and where there are no cgroups: this host in a mount namespace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from containers import CORE
from requires import requires as needs

pytestmark = needs("root", "overlay")

UNIFIED = "mount --bind {unified} /sys/fs/cgroup"
NOTHING = "mount -t tmpfs none /sys/fs/cgroup"


def unified() -> Path:
    """Return where this host has version 2 mounted."""
    rows = [row.split() for row in Path("/proc/self/mounts").read_text().splitlines()]
    found = [Path(row[1]) for row in rows if row[2] == "cgroup2"]
    if not found:
        pytest.skip("needs cgroup2: this host mounts none")
    return found[0]


def run(home: Path, prepare: str, *words: str) -> subprocess.CompletedProcess[str]:
    script = f'set -e; mount --make-rprivate /; {prepare}; exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "mlenv", *words],
        env={**os.environ, "MLENV_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_2_alone(built_home):
    parent = unified()
    before = set(parent.iterdir())
    prepare = UNIFIED.format(unified=parent)
    words = ("run", "--rm", "--network", "none", "quickstart", "sh", "-c")
    done = run(built_home, prepare, *words, "cat /proc/self/cgroup; ls /sys/fs/cgroup; exit 3")
    assert done.returncode == 3, done.stderr
    assert "0::/\n" in done.stdout
    assert "cgroup.procs" in done.stdout
    assert set(parent.iterdir()) == before


def test_version_2_ends_what_escaped_the_process_group(built_home):
    parent = unified()
    before = set(parent.iterdir())
    prepare = UNIFIED.format(unified=parent)
    started = run(
        built_home,
        prepare,
        "run",
        "-d",
        "--network",
        "none",
        "quickstart",
        "sh",
        "-c",
        "setsid sleep 777 & sleep 777",
    )
    assert started.returncode == 0, started.stderr
    made = set(parent.iterdir()) - before
    pids = [int(pid) for group in made for pid in (group / "cgroup.procs").read_text().split()]
    assert len(pids) >= 3
    removed = run(built_home, prepare, "rm", "-f", started.stdout.strip())
    assert removed.returncode == 0, removed.stderr
    assert set(parent.iterdir()) == before
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_without_cgroups_it_runs_and_says_what_is_not_limited(built_home):
    done = run(
        built_home,
        NOTHING,
        "run",
        "--rm",
        "--network",
        "none",
        "--memory",
        "200MB",
        "quickstart",
        "sh",
        "-c",
        "exit 4",
    )
    assert done.returncode == 4
    assert "warning: memory is not limited: no cgroups are mounted\n" in done.stderr
    assert "warning: pids is not limited: no cgroups are mounted\n" in done.stderr


def test_without_cgroups_no_device_is_open(built_home):
    """There are no device rules then; 1:11 is the kernel's log."""
    words = ("run", "--rm", "--network", "none", "quickstart", "sh", "-c")
    done = run(built_home, NOTHING, *words, "mknod /dev/k c 1 11; test -e /dev/k || echo none")
    assert done.stdout == "none\n", done.stderr
    assert "devices" not in done.stderr.replace("mknod: /dev/k", "")


def test_without_device_rules_a_foreign_bundle_is_warned_of(home, busybox_rootfs):
    """Its root may make and open devices; mlenv carries out what it says and tells what it cannot."""
    (home / "bundle").mkdir()
    held = ["CAP_MKNOD"]
    document = {
        "ociVersion": "1.0.2",
        "root": {"path": str(busybox_rootfs)},
        "process": {
            "args": ["true"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": held, "effective": held, "permitted": held},
        },
        "linux": {
            "namespaces": [{"type": kind} for kind in ("mount", "pid", "ipc", "uts", "network")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }
    (home / "bundle" / "config.json").write_text(json.dumps(document))
    script = f'set -e; mount --make-rprivate /; {NOTHING}; exec "$@"'
    core = [sys.executable, "-I", "-S", str(CORE), "run", "--bundle", str(home / "bundle"), "foreign"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *core], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: devices are not limited: ")
