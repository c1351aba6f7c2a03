"""The linters, as the tests of the code's form: ruff with every rule, mypy strict."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(*args: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", *args], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_ruff_finds_nothing() -> None:
    status, said = run("ruff", "check", "--no-cache", "--output-format=concise", ".")
    assert status == 0, said


def test_mypy_finds_nothing() -> None:
    status, said = run("mypy", "--no-error-summary")
    assert status == 0, said


def test_shell_scripts_parse() -> None:
    for shell, script in (("sh", "setup.sh"), ("bash", ".ci/run")):
        done = subprocess.run(
            [shell, "-n", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
