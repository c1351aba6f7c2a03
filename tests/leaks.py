"""What a container may leave behind, looked for before and after a test.

Other containers may come and go on the machine meanwhile: a thing counts as left only if it is still there
after a deadline and no living process of another `MLENV_HOME` accounts for it.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DEADLINE = 10.0
CGROUPS = Path("/sys/fs/cgroup")


def cgroups() -> set[str]:
    """The container groups below our own group, in every hierarchy, that hold no process."""
    found = set()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        parent = CGROUPS / (controllers.removeprefix("name=") or "") / path.lstrip("/")
        if parent.is_dir():
            found |= {str(group) for group in parent.glob("mlenv-*") if _is_empty(group)}
    return found


def _is_empty(group: Path) -> bool:
    """Whether a group is there and holds no process; another container's may end while we look."""
    try:
        return not (group / "cgroup.procs").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def mounts(home: Path) -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if f"{home}/" in line}


def processes(home: Path) -> set[str]:
    """Processes that were started with this `MLENV_HOME` or name a path in it, but for our own ancestors."""
    found = set()
    mine = {os.getpid(), os.getppid()}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in mine:
            continue
        try:
            words = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"{home}/".encode() in words or f"MLENV_HOME={home}\0".encode() in environment:
            found.add(f"{entry.name} {words.replace(bytes(1), b' ').decode(errors='replace').strip()}")
    return found


def links() -> set[str]:
    return {link.name for link in Path("/sys/class/net").glob("mlenv*")}


def foreign_containers() -> bool:
    """Whether a container of someone else is running, which then accounts for the links."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                words = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(b"mlenv-init") or b"mlenv/container/__main__.py" in words:
                return True
    return False


def run_state(home: Path) -> set[str]:
    """What is left in the run directory: sockets, states of containers in the foreground."""
    return {str(path) for path in (home / "run").rglob("*") if not path.is_dir()}


def left(home: Path, before: tuple[set[str], set[str]]) -> list[str]:
    found = sorted(mounts(home) | processes(home) | run_state(home) | (cgroups() - before[0]))
    new_links = links() - before[1]
    if new_links and not foreign_containers():
        found += sorted(new_links)
    return found


def pause(seconds: float) -> None:
    select.select([], [], [], seconds)


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `MLENV_HOME` of the test's own, which any user may enter."""
    directory = tmp_path_factory.mktemp("home")
    for parent in (directory, *directory.parents[:3]):
        if parent.owner() == directory.owner() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    monkeypatch.setenv("MLENV_HOME", str(directory))
    return directory


@pytest.fixture(autouse=True)
def leak_check(home: Path) -> Iterator[None]:
    """Fail a test that leaves a mount, process, group, link, socket or state file behind."""
    before = cgroups(), links()
    yield
    deadline = time.monotonic() + DEADLINE
    while (remains := left(home, before)) and time.monotonic() < deadline:
        pause(0.02)
    assert not remains, "left behind: " + "; ".join(remains)
