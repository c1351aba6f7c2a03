"""`mlenv up` and `mlenv down` as a user types them, for the tests that need a running environment."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import leaks
from host.front_end import FrontEnd

from mlenv.container.state import start_time

DEADLINE = 600.0


@dataclass(frozen=True, kw_only=True)
class Up:
    """What `mlenv up --json` said; `home` is `MLENV_HOME`, `project` the notebook folder."""

    home: Path
    project: Path
    url: str
    container: str

    @property
    def server(self) -> dict[str, Any]:
        """What the running server is known by: its pid, port and token."""
        return json.loads((self.home / "run" / "jupyter" / "server.json").read_text())

    @property
    def front_end(self) -> FrontEnd:
        return FrontEnd(self.server["port"], self.server["token"])

    def mlenv(self, *words: str) -> subprocess.CompletedProcess[str]:
        return mlenv(self.home, self.project, *words)


def mlenv(home: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "mlenv", *words],
        env={
            **os.environ,
            "MLENV_HOME": str(home),
            "NO_COLOR": "1",
            "FROM_THE_HOST": "passed",
            "CONDA_PREFIX": "/host",
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, f"mlenv {' '.join(words)} ended with {done.returncode}:\n{done.stderr}"
    return done


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def environment_up(home: Path, project: Path, spec: str, *options: str) -> Iterator[Up]:
    """Bring an environment up in `project` and down again, and see that nothing of it is left."""
    words = ("up", spec, "--no-browser", "--port", str(free_port()), "--json", *options)
    said = json.loads(mlenv(home, project, *words).stdout)
    up = Up(home=home, project=project, url=said["url"], container=said["container"])
    try:
        yield up
    finally:
        server = up.server["pid"]
        mlenv(home, project, "down", "--all")
    assert start_time(server) is None, "the server still runs"
    assert [str(path) for path in (home / "run" / "jupyter").iterdir()] == []
    assert kernel_directories(home) == []
    assert leaks.mounts(home) | leaks.processes(home) == set()


def kernel_directories(home: Path) -> list[str]:
    """Return the kernels' directories of all containers of a home."""
    return [str(path) for path in home.glob("run/k/*/*")]
