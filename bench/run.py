"""Measure mlenv beside its peers: `python bench/run.py`, one table at the end.

Rows of one section do the same work, interleaved in one run, in a random order each round; the table
shows medians, quartiles and ratios to the section's first row, and the promises of the project with what
became of them. Peers that are not installed are named and left out. Needs no running Docker: dockerd,
where it is installed, is started with its own state in namespaces of its own, and stopped at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import build
import peers
import start
from measure import Section, UnusableError, call, progress, table, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

SECTIONS = ("start", "kernel", "build")


def main() -> None:
    """Run the chosen sections, print the table, write the JSON."""
    asked = arguments()
    notes = [note] if (note := peers.enter_private_mounts()) else []
    work = Path(tempfile.mkdtemp(prefix="mlenv-bench-", dir=asked.work))
    try:
        made = measure(asked, work)
    finally:
        if not asked.keep:
            shutil.rmtree(work, onerror=_make_removable)
    facts = machine()
    print("\n\n".join([heading(facts, notes), *map(table, made)]))
    if asked.json:
        asked.json.write_text(json.dumps(document(facts, notes, made), indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sections", nargs="*", default=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}"
    )
    parser.add_argument(
        "-n", "--rounds", type=int, default=15, help="rounds of the start and kernel sections"
    )
    parser.add_argument("-b", "--builds", type=int, default=3, help="rounds of the build section")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument(
        "--work", type=Path, help="where temporary files go; 10 GB with Docker and three builds"
    )
    parser.add_argument("--keep", action="store_true", help="leave them there")
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return asked


def measure(asked: argparse.Namespace, work: Path) -> list[Section]:
    """Return the chosen sections, measured; one that fails says why and leaves the others standing."""
    os.environ["MLENV_HOME"] = str(work / "home")
    spec = build.write_specs(work / "base-spec") / "bench-base.yaml"
    progress("building the base environment")
    call(*start.MLENV, "build", spec)
    rootfs = start.rootfs_of(spec.stem, work / "rootfs.tar")
    made: list[Section] = []
    with ExitStack() as stack:
        docker = _docker(stack, work)

        def start_section() -> list[Section]:
            return [
                start.section(
                    image=spec.stem, rootfs_tar=rootfs, docker=docker, work=work, rounds=asked.rounds
                )
            ]

        def kernel_section() -> list[Section]:
            import kernel

            return [kernel.section(spec=spec, work=work, rounds=asked.rounds)]

        def build_sections() -> list[Section]:
            return build.sections(docker=docker, rootfs_tar=rootfs, work=work, rounds=asked.builds)

        known = {"start": start_section, "kernel": kernel_section, "build": build_sections}
        for name in asked.sections:
            try:
                made += known[name]()
            except UnusableError as error:
                made.append(Section(title=name, times={}, unusable={name: str(error)}))
    return made


def _docker(stack: ExitStack, work: Path) -> peers.Docker | None:
    try:
        return stack.enter_context(peers.docker_daemon(work / "docker"))
    except UnusableError as error:
        progress(f"without docker: {error}")
        return None


def machine() -> dict[str, str]:
    """Return the facts that the figures depend on."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    release = platform.freedesktop_os_release()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{os.cpu_count()} x {cpu[0].split(': ')[1] if cpu else platform.machine()}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "system": release["PRETTY_NAME"],
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else f"uid {os.geteuid()}",
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
        "crun": peers.version("crun", "--version"),
        "runc": peers.version("runc", "--version"),
        "podman": peers.version("podman", "--version"),
        "docker": peers.version("dockerd", "--version"),
        "uv": peers.version(str(Path(sys.prefix) / "bin" / "uv"), "--version"),
    }


def heading(facts: dict[str, str], notes: Sequence[str]) -> str:
    """Return the machine's facts as text."""
    return "\n".join(
        [*(f"{name:>7}: {value}" for name, value in facts.items()), *(f"   note: {n}" for n in notes)]
    )


def document(facts: dict[str, str], notes: Sequence[str], made: Sequence[Section]) -> dict[str, Any]:
    """Return everything as one JSON object; times are lists of seconds."""
    sections = [
        {**asdict(section), "verdicts": [verdict(section, target) for target in section.targets]}
        for section in made
    ]
    return {"schema": 1, "machine": facts, "notes": list(notes), "sections": sections}


def _make_removable(function: Any, path: str, _: object) -> None:
    """Open what nobody may enter, as overlayfs leaves it in its work directory, and try again."""
    Path(path).parent.chmod(0o700)
    Path(path).chmod(0o700)
    if Path(path).is_dir():
        shutil.rmtree(path, onerror=_make_removable)
    else:
        function(path)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
