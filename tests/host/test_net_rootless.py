"""The network of a user's containers: pasta, slirp4netns, and neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networks
import pytest
import requires
from requires import requires as needs

pytestmark = needs("root", "userns", "netns")


@pytest.fixture
def directory() -> Iterator[str]:
    """A directory that users can enter, where pytest's are root's alone."""
    with tempfile.TemporaryDirectory(prefix="mlenv-rootless-") as path:
        Path(path).chmod(0o755)
        yield path


def ask(helper: str, directory: str) -> dict[str, Any]:
    """Return what `rootless_network.py` says of a container with this helper."""
    paths = os.pathsep.join([str(networks.REPOSITORY), str(networks.REPOSITORY / "tests")])
    script = str(Path(__file__).with_name("rootless_network.py"))
    line = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, script]
    done = subprocess.run(
        [*line, helper, directory],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("helper", ["pasta", "slirp4netns"])
def test_a_helper_leads_out(helper: str, directory: str) -> None:
    requires.need(helper)
    said = ask(helper, directory)
    assert said["state"]["helper"] == helper
    assert said["state"]["warnings"] == []
    assert said["outside"] == "198.51.100.1"
    assert said["loopback"]
    assert said["published"] == "published"
    assert said["resolv.conf"] == "nameserver 10.0.2.3\n"
    assert said["name"] == "answer to example.org"
    assert "reached" not in said["host loopback by gateway"]
    assert said["killed shim"] == [True, False]
    assert said["helper left"] is False
    assert said["left"] == [f"{helper}.log"]


def test_without_a_helper_there_is_no_way_out_and_it_is_said(directory: str) -> None:
    said = ask("none", directory)
    assert said["state"]["helper"] is None
    assert said["state"]["warnings"] == [
        "the container has no way out to the network: install the package `passt` (or `slirp4netns`)"
    ]
    assert "unreachable" in said["outside"]
    assert said["loopback"]
    assert said["published"] == "published"
