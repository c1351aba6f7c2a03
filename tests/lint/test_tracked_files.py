"""What must not be in the repository: mirrors' names, this machine's paths, secrets, what is generated."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from requires import requires

REPOSITORY = Path(__file__).parents[2]

SECRETS = (r"-----BEGIN [A-Z ]*PRIVATE KEY", r"https?://[^/\s:@{}\"'`<>]+:[^/\s:@{}\"'`<>]+@[a-z]")
MERGE_LEFTOVERS = (r"^<{7} ", r"^>{7} ")


@cache
def tracked() -> tuple[Path, ...]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    paths = (REPOSITORY / name for name in listed.stdout.decode().split("\0") if name)
    return tuple(path for path in paths if path.is_file() and path != Path(__file__))


def occurrences(pattern: str) -> list[str]:
    wanted = re.compile(pattern.encode(), re.MULTILINE)
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content[:4096]:
            continue
        for match in wanted.finditer(content):
            line = content.count(b"\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(REPOSITORY)}:{line}: {match.group().decode()}")
    return found


@requires("git")
@pytest.mark.parametrize("pattern", MERGE_LEFTOVERS)
def test_no_merge_is_left_in_the_middle(pattern: str) -> None:
    assert occurrences(pattern) == []


@requires("git")
def test_locks_hold_no_address() -> None:
    assert [found for found in occurrences(r"[a-z]+://") if ".lock.json:" in found] == []


@requires("git")
@pytest.mark.parametrize("pattern", SECRETS)
def test_no_secret(pattern: str) -> None:
    allowed = ("tests/", "docs/")  # made-up ones, that show how secrets are kept out
    assert [found for found in occurrences(pattern) if not found.startswith(allowed)] == []


@requires("git")
def test_no_trace_of_this_machine() -> None:
    """Packages come from where the host says, never from us; an index of its own would be a leak."""
    for place in configured_hosts() | configured_folders() | {str(REPOSITORY)}:
        assert occurrences(rf"(?<![\w.-]){re.escape(place)}\b") == []


def configured_hosts() -> set[str]:
    said = pip_configuration()
    for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")):
        said += path.read_text() if path.is_file() else ""
    hosts = {urlsplit(url).hostname or "" for url in re.findall(r"https?://[^\s'\"]+", said)}
    return hosts - {"", "localhost", "127.0.0.1"}


def configured_folders() -> set[str]:
    """The folders that pip is told to look for packages in."""
    settings = [
        line for line in pip_configuration().splitlines() if "find-links" in line or "index-url" in line
    ]
    return {folder for line in settings for folder in re.findall(r"(?:file://|[\s'=])(/[^\s']+)", line)}


def pip_configuration() -> str:
    return subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=False).stdout


@requires("git")
def test_files_are_small() -> None:
    assert [str(path) for path in tracked() if path.stat().st_size > 1 << 20] == []


@requires("git")
def test_text_ends_with_one_newline() -> None:
    wrong = []
    for path in tracked():
        content = path.read_bytes()
        if (
            content
            and b"\0" not in content[:4096]
            and (not content.endswith(b"\n") or content.endswith(b"\n\n"))
        ):
            wrong.append(str(path.relative_to(REPOSITORY)))
    assert wrong == []
