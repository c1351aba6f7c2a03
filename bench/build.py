"""Building environments: cold, unchanged, one package added, and a second one that shares PyTorch.

Both sides install the same locked wheels from an index on the loopback interface onto the same base,
which is there beforehand with ipykernel. Docker's side is the best practice we know: BuildKit, uv, its
cache on a cache mount, link mode copy. Each round starts from a fresh store and a fresh uv cache;
nothing is deleted between rounds, because ext4 slows down where inodes were freed a moment before.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from index import serve
from measure import Section, Target, UnusableError, call, progress, timed
from peers import Docker

MLENV = [sys.executable, "-m", "mlenv"]

DESK = (
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "matplotlib",
    "pyarrow",
    "transformers",
    "tensorboard",
    "jupyterlab",
)
SPECS: dict[str, tuple[str, ...]] = {
    "bench-base": (),
    "bench-one": DESK,
    "bench-added": (*DESK, "humanize"),
    "bench-second": ("numpy", "seaborn", "networkx", "tqdm", "pillow"),
    "bench-edited": (*DESK, "tabulate"),
}
"""The environments by name and their packages; all but the first have PyTorch for the CPU."""

STEPS = (
    ("build of one environment, cold", "bench-one"),
    ("build, unchanged", "bench-one"),
    ("build, one package added (locked)", "bench-added"),
    ("build, second environment sharing PyTorch", "bench-second"),
    ("build, one package added (resolving included)", "bench-edited"),
)
UNLOCKED = "bench-edited"

OURS, THEIRS = "mlenv build", "docker build with uv"
TARGETS = {
    "build, unchanged": [Target(row=OURS, peer=None, most=0.3)],
    "build, one package added (locked)": [Target(row=OURS, peer=THEIRS, most=0.15)],
    "build, second environment sharing PyTorch": [Target(row=OURS, peer=THEIRS, most=0.15)],
    "build, one package added (resolving included)": [Target(row=OURS, peer=THEIRS, most=0.15)],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One tool in one round: how it builds an environment, and where its disk use shows."""

    name: str
    build: Callable[[str], object]
    disk: Path


def sections(*, docker: Docker | None, rootfs_tar: Path, work: Path, rounds: int) -> list[Section]:
    """Build everything `rounds` times on each side, and return one section per step."""
    specs = write_specs(work / "specs")
    wheels = collect_wheels(specs, work)
    made = [
        Section(title=title, times={OURS: [], THEIRS: []}, targets=TARGETS.get(title, ()))
        for title, _ in STEPS
    ]
    grown: dict[tuple[str, str], list[int]] = {}
    with serve(wheels) as url:
        environment = index_environment(url)
        base_home = lock_all(specs, environment, work / "home-base")
        if docker is None:
            _rounds(
                made, grown, rounds, lambda number: [mlenv_side(specs, base_home, environment, work, number)]
            )
        else:
            with serve(wheels, prefix=docker.enter_network()) as docker_url:
                prepare_docker(docker, rootfs_tar, work)
                _rounds(
                    made,
                    grown,
                    rounds,
                    lambda number: [
                        mlenv_side(specs, base_home, environment, work, number),
                        docker_side(docker, specs, docker_url, work, number),
                    ],
                )
    for section in made:
        section.times = {name: times for name, times in section.times.items() if times}
        section.notes.append(disk_note(section.title, grown))
    return made


def _rounds(
    made: Sequence[Section],
    grown: dict[tuple[str, str], list[int]],
    rounds: int,
    sides_of: Callable[[int], list[Side]],
) -> None:
    for number in range(rounds):
        sides = sides_of(number)
        for section, (title, spec) in zip(made, STEPS, strict=True):
            progress(f"{title}: round {number + 1} of {rounds}")
            for side in random.sample(sides, len(sides)):
                before = disk_use(side.disk)
                section.times[side.name].append(timed(lambda side=side, spec=spec: side.build(spec)))
                grown.setdefault((title, side.name), []).append(disk_use(side.disk) - before)


def write_specs(folder: Path) -> Path:
    """Write the environments' specs."""
    folder.mkdir(parents=True)
    for name, packages in SPECS.items():
        torch = "" if name == "bench-base" else 'pytorch: "2.13"\ncuda: cpu\n'
        listed = f"packages: [{', '.join(packages)}]\n" if packages else ""
        (folder / f"{name}.yaml").write_text(
            f'name: {name}\npython: "3.11"\nbase: debian:12\n{torch}{listed}'
        )
    return folder


def collect_wheels(specs: Path, work: Path) -> Path:
    """Lock every environment as this machine is configured, and fetch the locks' wheels into one folder."""
    folder = work / "wheels"
    folder.mkdir()
    environment = {**os.environ, "MLENV_HOME": str(work / "home-fetch")}
    wanted: dict[str, str] = {}
    for name in SPECS:
        progress(f"locking {name} and fetching its wheels")
        call(*MLENV, "lock", specs / f"{name}.yaml", env=environment)
        wanted.update(dict.fromkeys(requirements(specs, name), name))
    for number, batch in enumerate(_one_version_each(wanted)):
        listed = work / f"wheels-{number}.txt"
        listed.write_text("\n".join(batch) + "\n")
        call(*pip_download(), "-d", folder, "-r", listed)
    return folder


def _one_version_each(lines: Mapping[str, str]) -> list[list[str]]:
    """Split requirements so that no batch holds two versions of one package, which pip would refuse."""
    batches: list[dict[str, str]] = []
    for line in lines:
        name = line.split("==")[0]
        batch = next((batch for batch in batches if name not in batch), None)
        if batch is None:
            batches.append(batch := {})
        batch[name] = line
    return [list(batch.values()) for batch in batches]


def pip_download() -> list[str]:
    """Return the command that fetches wheels for the target, whatever Python this is."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 37)]
    platforms = [
        *tags,
        "manylinux2014_x86_64",
        "manylinux2010_x86_64",
        "manylinux1_x86_64",
        "linux_x86_64",
        "any",
    ]
    target = ["--python-version", "3.11", "--implementation", "cp", "--only-binary=:all:"]
    chosen = [word for platform in platforms for word in ("--platform", platform)]
    return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", *target, *chosen]


def requirements(specs: Path, name: str) -> list[str]:
    """Return the wheels of a lock as pip's requirement lines with hashes."""
    lock = json.loads((specs / f"{name}.lock.json").read_text())
    return [
        f"{wheel['name']}=={wheel['version']} --hash=sha256:{wheel['sha256'].removeprefix('sha256:')}"
        for wheel in lock["wheels"]
    ]


def index_environment(url: str) -> dict[str, str]:
    """Return the environment in which pip and uv know our index alone."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "UV_DEFAULT_INDEX": url, "PIP_INDEX_URL": url}


def lock_all(specs: Path, environment: Mapping[str, str], home: Path) -> Path:
    """Lock against our index in a home that holds the base, and return that home."""
    ours = {**environment, "MLENV_HOME": str(home)}
    for name in SPECS:
        call(*MLENV, "lock", "--upgrade", specs / f"{name}.yaml", env=ours)
    progress("building the base")
    call(*MLENV, "build", specs / "bench-base.yaml", env=ours)
    return home


def mlenv_side(specs: Path, base_home: Path, environment: Mapping[str, str], work: Path, number: int) -> Side:
    """Return our side with a store that holds the base alone."""
    home = work / f"home-{number}"
    call("cp", "-a", base_home, home)
    ours = {**environment, "MLENV_HOME": str(home)}
    own_specs = Path(shutil.copytree(specs, work / f"specs-{number}"))
    (own_specs / f"{UNLOCKED}.lock.json").unlink()
    return Side(
        name=OURS, build=lambda name: call(*MLENV, "build", own_specs / f"{name}.yaml", env=ours), disk=home
    )


def prepare_docker(docker: Docker, rootfs_tar: Path, work: Path) -> None:
    """Import the base and put uv into it."""
    docker.call("import", rootfs_tar, "bench-base")
    context = work / "docker-uv"
    context.mkdir()
    uv = Path(sys.prefix) / "bin" / "uv"
    shutil.copy2(uv if uv.exists() else shutil.which("uv") or uv, context / "uv")
    (context / "Dockerfile").write_text("FROM bench-base\nCOPY uv /usr/local/bin/uv\n")
    docker.call("build", "-q", "-t", "bench-uv", context)


def docker_side(docker: Docker, specs: Path, url: str, work: Path, number: int) -> Side:
    """Return Docker's side with a uv cache of its own for this round."""

    def build(name: str) -> None:
        context = work / f"docker-{number}-{name}"
        if not context.exists():
            write_context(context, specs, name, url, number)
        docker.call("build", "-q", "--network=host", "-t", f"{name}:{number}", context)

    return Side(name=THEIRS, build=build, disk=docker.data)


def write_context(context: Path, specs: Path, name: str, url: str, number: int) -> None:
    """Write a Dockerfile and the requirements: the lock's wheels, or names where uv shall resolve."""
    context.mkdir()
    lines = ["torch==2.13.0+cpu", *SPECS[name]] if name == UNLOCKED else requirements(specs, name)
    (context / "requirements.txt").write_text("\n".join(lines) + "\n")
    options = "" if name == UNLOCKED else "--no-deps --require-hashes "
    (context / "Dockerfile").write_text(
        f"FROM bench-uv\nENV UV_LINK_MODE=copy UV_DEFAULT_INDEX={url} ROUND={number}\n"
        "COPY requirements.txt /tmp/requirements.txt\n"
        f"RUN --mount=type=cache,id=uv-{number},target=/root/.cache/uv"
        f" uv pip install -q --python /opt/env/bin/python {options}-r /tmp/requirements.txt\n"
    )


def disk_use(path: Path) -> int:
    """Return the bytes that a tree takes on disk."""
    return int(call("du", "-sxB1", path).split()[0])


def disk_note(title: str, grown: Mapping[tuple[str, str], Sequence[int]]) -> str:
    """Return what each side's disk use grew by in a step."""
    parts = [
        f"{name} {median(sizes) / 1e6:,.0f} MB"
        for (step, name), sizes in grown.items()
        if step == title and sizes
    ]
    if not parts:
        raise UnusableError(f"no sizes for {title}")
    return "disk grew by: " + ", ".join(parts)
