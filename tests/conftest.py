"""What all tests share: their order, what they need, the skips that causes, and one built environment."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requires
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent

ORDER = ("lint", "unit", "property", "conformance", "host", "faults", "perf")
"""Cheap tests first, so that a fault in the code shows before an environment is built."""


settings.register_profile(
    "mlenv",
    deadline=None,  # a busy machine is no fault
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
settings.load_profile("mlenv")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "requires(*needs): skip where the machine lacks one of these; see requires.py"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    room = item.path.relative_to(TESTS).parts[0]
    return ORDER.index(room) if room in ORDER else len(ORDER)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        requires.need(*mark.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    needs = Counter(
        found[1] for report in reports if (found := re.search(r"needs ([\w-]+): ", str(report.longrepr)))
    )
    if needs:
        terminalreporter.section("skipped for what this machine lacks")
        for name, count in needs.most_common():
            terminalreporter.line(f"{count:5} {name}: {requires.missing(name)}")


@pytest.fixture(scope="session")
def built_home() -> Iterator[Path]:
    """An `MLENV_HOME` with the environment `quickstart` resolved and built, once for the whole run."""
    requires.need("index", "mirror")
    home = Path(tempfile.mkdtemp(prefix="mlenv-tests-"))
    try:
        build = [sys.executable, "-m", "mlenv", "build", "quickstart"]
        done = subprocess.run(
            build,
            env={**os.environ, "MLENV_HOME": str(home)},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.fail(
                f"`mlenv build quickstart` ended with {done.returncode}:\n{done.stderr}", pytrace=False
            )
        yield home
    finally:
        remove_tree(home)


def remove_tree(root: Path) -> None:
    """Delete a tree with directories that nobody may enter, as overlayfs leaves in its work directory."""
    for folder, names, _ in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if stat.S_ISDIR(path.lstat().st_mode) and path.lstat().st_mode & 0o700 != 0o700:
                path.chmod(0o700)
    shutil.rmtree(root)
