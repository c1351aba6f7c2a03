"""Containers for tests: a root filesystem of one static program, and users to run them as."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requires

REPOSITORY = Path(__file__).parents[1]
CORE = REPOSITORY / "mlenv" / "container" / "__main__.py"
APPLETS = (
    "sh true false cat ls id env mount umount ps sleep echo hostname kill grep head stty mkdir rm touch dd"
)
MORE_APPLETS = "sort nproc stat unshare readlink wc tail chmod chown mknod tty test tr seq printf usleep"
NOBODY_IN_PARTICULAR = 12345
"""A uid without a name and so without subordinate ids."""


@pytest.fixture(scope="session")
def busybox_rootfs() -> Iterator[Path]:
    """A root filesystem that anyone may read: busybox, two users, two groups."""
    requires.need("busybox")
    root = Path(tempfile.mkdtemp(prefix="mlenv-busybox-"))
    root.chmod(0o755)
    program = shutil.which("busybox")
    assert program
    (root / "bin").mkdir()
    shutil.copy(program, root / "bin" / "busybox")
    for applet in (APPLETS + " " + MORE_APPLETS).split():
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc").mkdir()
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nbob:x:7:8:Bob:/home/bob:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\nbobs:x:8:\nextra:x:50:bob,eve\n")
    for name in ("proc", "sys", "dev", "tmp", "root"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    yield root
    shutil.rmtree(root)


class User:
    """Someone who runs the core: root, a user with subordinate ids, or one without."""

    def __init__(self, kind: str, uid: int, home: Path, python: str) -> None:
        self.kind = kind
        self.uid = uid
        self.home = home
        self.python = python

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "MLENV_HOME": str(self.home),
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def options(self) -> dict[str, Any]:
        """Options of subprocess that make a process this user's."""
        chosen: dict[str, Any] = {"env": self.environment(), "cwd": self.home}
        if self.uid != os.geteuid():
            chosen |= {"user": self.uid, "group": self.uid, "extra_groups": []}
        return chosen

    def python_script(
        self, script: str, request: object = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a script with the request as JSON on its stdin."""
        return subprocess.run(
            [self.python, "-c", script],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            **self.options(),
            **options,
        )

    def run(self, *args: str, **wanted: Any) -> subprocess.CompletedProcess[str]:
        """Run `args` in a container in the foreground; `wanted` are options of `runtime_config`."""
        return self.python_script(RUN_IN_FOREGROUND, {"args": args, "core": str(CORE), **wanted})


RUN_IN_FOREGROUND = """
import json, os, sys, tempfile
from pathlib import Path, PurePosixPath
from mlenv.container import config
request = json.load(sys.stdin)
core, edit, stdin = request.pop("core"), request.pop("edit", {}), request.pop("stdin", None)
request["layers"] = [Path(layer) for layer in request["layers"]]
if "mounts" in request:
    request["mounts"] = [
        config.Mount(source=Path(source), target=PurePosixPath(target), readonly=readonly)
        for source, target, readonly in request["mounts"]
    ]
if "upper" in request:
    request["upper"] = Path(request["upper"])
if "resources" in request:
    request["resources"] = config.Resources(**request["resources"])
request.setdefault("env", {"PATH": "/bin"})
request.setdefault("network", "none")
with tempfile.TemporaryDirectory(dir=os.environ["MLENV_HOME"]) as bundle:
    made = config.runtime_config(**request)
    for path, value in edit.items():
        place = made
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    os.mkdir(f"{bundle}/rootfs")
    Path(f"{bundle}/config.json").write_text(json.dumps(made))
    import subprocess
    command = [sys.executable, "-I", "-S", core, "run", "--bundle", bundle, f"test-{os.getpid()}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL)
    for folder, names, _ in os.walk(bundle):
        for name in names:
            if not os.path.islink(f"{folder}/{name}"):
                os.chmod(f"{folder}/{name}", 0o700)
sys.exit(done.returncode)
"""


def python_for(uid: int) -> str:
    """An interpreter that this user may execute; root's own may lie where nobody else can go."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        options: dict[str, Any] = {} if uid == 0 else {"user": uid, "group": uid, "extra_groups": []}
        try:
            done = subprocess.run([candidate, "-c", "pass"], check=False, capture_output=True, **options)
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    pytest.skip("needs python: no interpreter that an ordinary user may execute")


def user_of_tests() -> int:
    """The uid of `mlenv-test`, made with subordinate ids where it is not there yet."""
    try:
        return pwd.getpwnam("mlenv-test").pw_uid
    except KeyError:
        subprocess.run(["useradd", "--create-home", "mlenv-test"], check=True)
    uid = pwd.getpwnam("mlenv-test").pw_uid
    if "mlenv-test:" not in Path("/etc/subuid").read_text():
        added = "--add-subuids", "200000-265535", "--add-subgids", "200000-265535"
        subprocess.run(["usermod", *added, "mlenv-test"], check=True)
    return uid


def make_user(kind: str, home: Path) -> User:
    if kind == "root":
        requires.need("root", "overlay")
        return User(kind, 0, home, sys.executable)
    requires.need("userns", "overlay")
    if os.geteuid() != 0:  # this user's own ids decide which of the two it is
        requires.need("newuidmap" if kind == "ranges" else "root")
        return User(kind, os.geteuid(), home, sys.executable)
    if kind == "ranges":
        uid = user_of_tests()
        if not shutil.which("newuidmap"):
            pytest.skip("needs newuidmap: it is not installed")
    else:
        uid = NOBODY_IN_PARTICULAR
    os.chown(home, uid, uid)
    return User(kind, uid, home, python_for(uid))


@pytest.fixture
def ordinary_user(home: Path) -> User:
    """The user `mlenv-test`, who has subordinate ids."""
    return make_user("ranges", home)


@pytest.fixture(params=["root", "ranges", "single"])
def user(request: pytest.FixtureRequest, home: Path) -> User:
    """Everyone the core works for: root, a user with newuidmap, a user without."""
    return make_user(request.param, home)
