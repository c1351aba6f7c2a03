"""A build killed at every stage: nothing half-made is seen, and the next command goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from image_makers import FakeRunner, FileSources, make_lock, write_deb, write_wheel

from mlenv.image.build import ensure_image
from mlenv.image.images import images
from mlenv.image.store import Store
from mlenv.progress import SilentProgress

PROGRAM = """
import os, signal, sys
sys.path[:0] = {paths!r}
from image_makers import FakeRunner, FileSources, make_lock
from pathlib import Path
from mlenv.image.build import ensure_image
from mlenv.image.store import Store
from mlenv.progress import SilentProgress

steps = int(sys.argv[1])
def die(frame, event, argument):
    global steps
    if event == "c_call" and argument.__name__ in {calls!r}:
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.{signal})
sys.setprofile(die)
import threading
threading.setprofile(die)
files = [Path(each) for each in sys.argv[3:]]
debs = [each for each in files if each.suffix == ".deb"]
wheels = [each for each in files if each.suffix == ".whl"]
ensure_image(make_lock(debs, wheels), store=Store(Path(sys.argv[2])), sources=FileSources(files),
             run=FakeRunner(), progress=SilentProgress(), bytecode=False)
"""
CALLS = ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "flock")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "home"))
    debs = [write_deb(tmp_path, "base-files", essential=True, files={"etc/x": b"x"})]
    return [*debs, *(write_wheel(tmp_path, name) for name in ("alpha", "beta"))]


def build(store, files):
    debs, wheels = (
        [each for each in files if each.suffix == ".deb"],
        [each for each in files if each.suffix == ".whl"],
    )
    sources = FileSources(files)
    image = ensure_image(
        make_lock(debs, wheels),
        store=store,
        sources=sources,
        run=FakeRunner(),
        progress=SilentProgress(),
        bytecode=False,
    )
    return image, sources


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_build_killed_before_any_call_that_changes_the_disk_is_resumed(tmp_path, files, name):
    expected, _ = build(Store(tmp_path / "reference"), files)
    program = PROGRAM.format(paths=[str(Path(__file__).parents[1]), *sys.path], calls=set(CALLS), signal=name)
    killed, step = 0, 1
    while True:
        root = tmp_path / f"store{step}"
        command = [sys.executable, "-c", program, str(step), str(root), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        store = Store(root)
        if done.returncode == 0:
            break
        assert done.returncode in {-signal.SIGKILL, -signal.SIGINT, 1}, done.stderr
        killed += 1
        for meta in root.glob("trees/sha256/*/*/meta.json"):
            assert (meta.parent / "index").exists()
        if (root / "index.json").exists():
            assert [each.digest for each in images(store)] == [expected.digest]
        image, _ = build(store, files)
        assert image.digest == expected.digest
        # An image that was whole is used without looking around; whoever makes something next sweeps.
        store.prepare()
        assert [path for each in ("tmp", "trash") for path in (root / each).iterdir()] == []
        step += 9 if name == "SIGKILL" else 17
    assert killed > 5
