"""Start of `true` in a container: create, start, wait, remove, as the shell sees it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Contender, Section, Target, UnusableError, call, race
from peers import Docker, low_limits, podman

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

import mlenv.container

CORE = Path(mlenv.container.__file__).parent / "__main__.py"
MLENV = [sys.executable, "-m", "mlenv"]

TARGETS = (
    Target(row="mlenv core", peer="crun", most=1.3),
    Target(row="mlenv run --rm", peer="docker run --rm", most=0.2),
)


def section(*, image: str, rootfs_tar: Path, docker: Docker | None, work: Path, rounds: int) -> Section:
    """Race them on one root filesystem: mlenv from its store, the others from the same files as a tar."""
    bundle = make_bundle(work / "bundle", rootfs_tar)
    contenders = [
        *runtimes(bundle, work),
        Contender(name="mlenv run --rm", run=lambda: call(*MLENV, "run", "--rm", image, "true")),
        Contender(
            name="mlenv run --rm --network none",
            run=lambda: call(*MLENV, "run", "--rm", "--network", "none", image, "true"),
        ),
        *engines(rootfs_tar, docker, work),
    ]
    made = race("start of `true` in a container", contenders, rounds=rounds, targets=TARGETS)
    made.notes.append(
        "mlenv core, crun and runc run one bundle, as mlenv writes it: namespaces, cgroup, seccomp,"
    )
    made.notes.append(
        "a plain directory as root and no network; the others are whole commands with their defaults"
    )
    return made


def make_bundle(path: Path, rootfs_tar: Path) -> Path:
    """Unpack the root filesystem and write a configuration that every runtime knows."""
    rootfs = path / "rootfs"
    rootfs.mkdir(parents=True)
    call("tar", "-C", rootfs, "-xf", rootfs_tar)
    (path / "config.json").write_text(json.dumps(configuration(), indent=1))
    return path


def configuration() -> dict[str, Any]:
    """Return the OCI configuration that mlenv writes for `true`, on a plain root, with no network set up.

    Without its limits on open files and the like: the others fail where root may not raise them.
    """
    from mlenv.container.config import runtime_config

    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    written = runtime_config(args=["true"], env={"PATH": path}, hostname="bench", network="none", init=False)
    return {**written, "annotations": {}, "process": {**written["process"], "rlimits": []}}


def runtimes(bundle: Path, work: Path) -> list[Contender]:
    """Return the low-level runtimes on one bundle, ours first."""
    numbers = count(1)

    def named(command: Sequence[str | Path]) -> Callable[[], object]:
        return lambda: call(*command, f"bench-{os.getpid()}-{next(numbers)}")

    core = [sys.executable, "-I", "-S", CORE, "run", "--bundle", bundle]
    rows = [Contender(name="mlenv core", run=named(core))]
    for peer in ("crun", "runc"):
        if shutil.which(peer):
            command = [peer, f"--root={work / peer}", "run", "--bundle", bundle]
            rows.append(Contender(name=peer, run=named(command)))
    return rows


def engines(rootfs_tar: Path, docker: Docker | None, work: Path) -> list[Contender]:
    """Return the engines that are here, the same root filesystem imported into each."""
    rows = []
    if shutil.which("podman"):
        command = podman(work / "podman")

        def run_podman() -> None:
            call(*command, "run", "--rm", *low_limits(), "bench", "true")

        rows.append(
            Contender(name="podman run --rm", run=run_podman, prepare=_once_only(command, rootfs_tar))
        )
    if docker is not None:
        docker.call("import", rootfs_tar, "bench")
        rows.append(
            Contender(name="docker run --rm", run=lambda: docker.call("run", "--rm", "bench", "true"))
        )
    return rows


def _once_only(command: Sequence[str], rootfs_tar: Path) -> Callable[[], None]:
    """Return a preparation that imports the image the first time it is called."""
    done: list[bool] = []

    def prepare() -> None:
        if not done:
            call(*command, "import", rootfs_tar, "bench")
            done.append(True)

    return prepare


def rootfs_of(image: str, into: Path) -> Path:
    """Write the root filesystem of an image of ours to a tar, as a container of it sees it."""
    import subprocess

    with into.open("wb") as out:
        command = [*MLENV, "run", "--rm", "--network", "none", image]
        done = subprocess.run(
            [*command, "tar", "--one-file-system", "--exclude=./dev/*", "-C", "/", "-c", "."],
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
        )
    if done.returncode != 0:
        raise UnusableError(f"reading the root filesystem of {image}: {done.stderr.decode()[-300:]}")
    return into
