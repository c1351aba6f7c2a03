"""uv as a process: run it away from any project, and turn what it says when it fails into errors.

uv is used with the host's own configuration, an interpreter named outright and an empty directory around it,
so neither a virtual environment nor a project near the caller changes the answer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv import paths
from mlenv.errors import IndexUnreachableError, PackageNotFoundError, ResolveError
from mlenv.resolve.indexes import Indexes, redacted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_TIME_LIMIT = 1800.0
"""Seconds after which uv is taken to hang; its own network timeouts are far below."""

_BOX = re.compile(r"^[\s│×╰─▶├╭>]*(cause:|Caused by:|error:)?\s*")  # noqa: RUF001 - uv's own drawing
_NOT_FOUND = re.compile(
    r"Because (?P<name>[\w.-]+) was not found in the (?:package registry|provided package)"
)
_NO_VERSION = re.compile(
    r"there (?:is|are) no versions? of (?P<name>[\w.-]+)(?:\[[^]]*\])?\s*(?P<version>[=<>!~]=?=?[^\s,]+)?"
)
_NO_WHEEL = re.compile(
    r"(?P<name>[\w.-]+?)(?:==(?P<version>\S+))? (?:has|have) no (?:usable )?wheels"
    r"|all versions of (?P<every>[\w.-]+) have no usable wheels"
)
_UNREACHABLE = re.compile(
    r"Request failed|Failed to fetch|error sending request|Failed to (?:read|download)", re.IGNORECASE
)


class UvError(Exception):
    """uv ended with an error; `said` is its stderr without credentials."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


def find_uv() -> str:
    """Return uv's path: the one installed beside mlenv, else the one on PATH.

    Raises: ResolveError with code `uv-missing`.
    """
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if found is None:
        raise ResolveError(
            "uv is not installed",
            cause="no `uv` beside this Python nor on PATH",
            hint=f"{sys.executable} -m pip install uv",
            code="uv-missing",
        )
    return found


@contextmanager
def workspace() -> Iterator[Path]:
    """Give an empty directory whose own empty uv.toml ends uv's search for a project's configuration."""
    root = paths.private_dir(paths.cache_dir() / "resolve")
    with tempfile.TemporaryDirectory(dir=root, prefix="uv-") as folder:
        Path(folder, "uv.toml").write_text("")
        yield Path(folder)


def run_uv(args: Sequence[str], *, indexes: Indexes, directory: Path) -> str:
    """Run uv in `directory` and return its stdout.

    Raises: UvError where it fails; ResolveError where it hangs or cannot be started.
    """
    command = [find_uv(), *args]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=indexes.environment,
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise ResolveError(f"uv did not answer within {_TIME_LIMIT:.0f} s", code="uv-timeout") from error
    except OSError as error:
        raise ResolveError("uv cannot be started", cause=str(error), code="uv-missing") from error
    if done.returncode:
        raise UvError(redacted(done.stderr))
    return done.stdout


# --- what uv says


def sentences(said: str) -> str:
    """Return what uv said as plain lines: without box drawing, "cause:" words and line breaks inside."""
    blocks: list[str] = []
    for line in said.splitlines():
        text = _BOX.sub("", line).strip()
        starts = bool(re.match(r"\s*(error|cause|hint|warning|[×╰├])", line)) or not line.strip()  # noqa: RUF001
        if text and (starts or not blocks):
            blocks.append(text)
        elif text:
            blocks[-1] += " " + text
    return "\n".join(block for block in blocks if not block.startswith("warning"))


def explain(failure: UvError, *, python: str, platform: str) -> ResolveError:
    """Return the error that uv's failure means for a resolution aimed at `python` ("3.9.2") on `platform`."""
    said = sentences(failure.said)
    flat = " ".join(said.split())
    explanation, hints = _split(said)
    if "No solution found" not in flat:
        return _request_error(said) if _UNREACHABLE.search(flat) else _other_error(said)
    if found := _NOT_FOUND.search(flat):
        return PackageNotFoundError(
            f"no package index of this host has `{found['name']}`",
            cause=explanation,
            hint="check the spelling, or add its index: `pip config set global.extra-index-url URL`",
        )
    if found := _NO_WHEEL.search(flat):
        name = found["every"] or found["name"]
        version = f" {found['version']}" if found["version"] else ""
        return ResolveError(
            f"`{name}`{version} has no wheel for Python {python} on {platform}",
            cause=explanation,
            hint=hints or "choose a version or a Python that it has wheels for",
            code="no-wheel",
        )
    if found := _NO_VERSION.search(flat):
        return PackageNotFoundError(
            f"no package index of this host has `{found['name']}{found['version'] or ''}`",
            cause=explanation,
            hint=hints or None,
        )
    return ResolveError(
        "these packages cannot be installed together",
        cause=explanation,
        hint=hints or "relax one of the versions that the cause names",
        code="conflict",
    )


def missing_pin(failure: UvError) -> tuple[str, str] | None:
    """Return name and version of the exact pin that uv did not find, or None."""
    found = _NO_VERSION.search(" ".join(sentences(failure.said).split()))
    if found and (found["version"] or "").startswith("=="):
        return found["name"], found["version"].lstrip("=")
    return None


def _split(said: str) -> tuple[str, str]:
    """Return uv's explanation and its hints."""
    lines = [line for line in said.splitlines() if not line.startswith("No solution found")]
    hints = [line.removeprefix("hint:").strip() for line in lines if line.startswith("hint:")]
    return "\n".join(line for line in lines if not line.startswith("hint:")), "\n".join(hints)


def _request_error(said: str) -> ResolveError:
    """Return the error for an index that did not answer as it should, told apart by why."""
    address = re.search(r"(https?|file)://[^\s)`]+", said)
    place = f"`{address.group(0)}`" if address else "a package index"
    low = said.lower()
    if "certificate" in low or "tls" in low or "ssl" in low:
        return IndexUnreachableError(
            f"{place} cannot be trusted",
            cause=said,
            hint="name your organisation's CA bundle: `SSL_CERT_FILE=…`, or `pip config set global.cert …`",
            code="index-tls",
        )
    if "407" in low or "proxy" in low or "tunnel" in low:
        return IndexUnreachableError(
            f"{place} cannot be reached through the proxy",
            cause=said,
            hint="check HTTPS_PROXY and `pip config list`",
        )
    if re.search(r"\b(401|403)\b", low) or "unauthorized" in low or "forbidden" in low:
        return IndexUnreachableError(
            f"{place} refused the credentials, or wants some",
            cause=said,
            hint="check the user and password of this index in pip's configuration, ~/.netrc or uv's",
            code="index-denied",
        )
    if "timed out" in low or "timeout" in low:
        return IndexUnreachableError(
            f"{place} did not answer in time",
            cause=said,
            hint="try again, or allow more time: `UV_HTTP_TIMEOUT=300` (seconds)",
            code="index-timeout",
        )
    return IndexUnreachableError(
        f"{place} cannot be reached", cause=said, hint="check the network, the proxy and `pip config list`"
    )


def _other_error(said: str) -> ResolveError:
    return ResolveError("uv could not resolve the packages", cause=said, code="uv-failed")
