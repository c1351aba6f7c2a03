"""Start-up is a feature: what the frequent commands must not import. No clock is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

HEAVY = {
    "IPython",
    "aiohttp",
    "asyncio",
    "httpx",
    "ipykernel",
    "jsonschema",
    "jupyter_client",
    "jupyter_core",
    "jupyter_server",
    "jupyterlab",
    "packaging",
    "pydantic",
    "pyroute2",
    "requests",
    "rich",
    "tornado",
    "traitlets",
    "urllib3",
    "yaml",
    "zmq",
}
"""Each costs 25 to 500 ms of CPU; none is needed to say a version or to list containers."""

RUN = """
import os, sys
before = set(sys.modules)
from mlenv.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
else:
    status = 0
sys.stdout.flush()
os.write(2, ("\\n--imported--" + repr(status) + " " + " ".join(set(sys.modules) - before)).encode())
"""


def imported_by(home: Path, *command: str) -> tuple[str, set[str]]:
    """Return the exit status and the top-level modules that one command brought in."""
    environment = {**os.environ, "MLENV_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command], env=environment, capture_output=True, text=True, check=True
    )
    status, _, modules = done.stderr.split("--imported--")[1].partition(" ")
    return status, {name.split(".")[0] for name in modules.split()}


@pytest.mark.parametrize(
    "command",
    [["--version"], ["--help"], ["ps"], ["ps", "--json"], ["logs", "nobody"], ["stop", "nobody"]],
    ids=" ".join,
)
def test_a_frequent_command_imports_nothing_heavy(tmp_path: Path, command: list[str]) -> None:
    status, modules = imported_by(tmp_path, *command)
    assert status == ("1" if "nobody" in command else "0")
    assert modules & HEAVY == set()


def test_the_package_imports_nothing() -> None:
    script = "import sys; before = set(sys.modules); import mlenv; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['mlenv']"
