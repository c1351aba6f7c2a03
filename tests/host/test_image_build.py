"""Real bases and wheels, built twice: by mlenv's own core, and by unshare and chroot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from image_makers import ChrootRunner

from mlenv.image.build import ensure_image, find_built
from mlenv.image.store import Store
from mlenv.launch.sources import HostSources
from mlenv.lock.file import read_lock
from mlenv.progress import SilentProgress

REPOSITORY = Path(__file__).parents[2]
LOCK = REPOSITORY / "envs/quickstart.lock.json"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """The quickstart image in a store of its own, without mlenv's container core."""
    home = tmp_path_factory.mktemp("image")
    lock = read_lock(LOCK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLENV_HOME", str(home))
        store = Store(home / "store")
        sources = HostSources(lock, spec_path=LOCK.parent / "quickstart.yaml", mirror=None)
        image = ensure_image(
            lock, store=store, sources=sources, run=ChrootRunner(), progress=SilentProgress()
        )
    return store, image


@pytest.mark.requires("root", "overlay", "index", "mirror")
def test_two_builds_of_a_lock_give_the_same_manifest(rebuilt, built_home):
    _, image = rebuilt
    ours = find_built(Store(built_home / "store"), read_lock(LOCK).digest, name="quickstart")
    assert ours is not None
    assert ours.digest == image.digest


@pytest.mark.requires("root", "overlay", "index", "mirror")
def test_the_image_runs_its_packages(rebuilt, tmp_path):
    _, image = rebuilt
    program = (
        "import json, sys, numpy, matplotlib, ipykernel; print(json.dumps([sys.prefix, sys.executable]))"
    )
    (tmp_path / "upper").mkdir()
    status = ChrootRunner().run(
        ["/opt/env/bin/python", "-c", program],
        layers=image.layers,
        upper=tmp_path / "upper",
        env=dict(item.split("=", 1) for item in image.config["config"]["Env"]),
        log=tmp_path / "log",
    )
    assert (status, json.loads((tmp_path / "log").read_text())) == (0, ["/opt/env", "/opt/env/bin/python"])
    written = list((tmp_path / "upper").rglob("*.pyc"))
    assert written == []


@pytest.mark.requires("root", "overlay", "index", "mirror")
def test_every_package_is_installed_and_nothing_of_the_build_is_left(rebuilt):
    _, image = rebuilt
    base = image.layers[0]
    status = (base / "var/lib/dpkg/status").read_text()
    packages = [line for line in status.splitlines() if line.startswith("Package: ")]
    assert len(packages) == len(read_lock(LOCK).base.packages)
    assert {line for line in status.splitlines() if line.startswith("Status: ")} == {
        "Status: install ok installed"
    }
    assert list((base / "dev").iterdir()) == []
    assert not (base / "var/log/dpkg.log").exists()
    assert list(base.rglob("__pycache__")) == []


@pytest.mark.requires("root", "overlay", "index", "mirror")
def test_an_unchanged_build_is_two_reads(rebuilt):
    store, image = rebuilt
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mlenv.image.build import find_built\n"
        "from mlenv.image.store import Store\n"
        "from mlenv.lock.file import read_lock\n"
        "lock = read_lock(Path(sys.argv[2]))\n"
        "print(find_built(Store(Path(sys.argv[1])), lock.digest, name=lock.name).digest)\n"
        "heavy = {'urllib3', 'ssl', 'zipfile', 'lzma', 'isal', 'concurrent.futures', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(store.root), str(LOCK)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [image.digest, "[]"]
