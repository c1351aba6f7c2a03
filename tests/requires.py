"""What a test needs of the machine, found out by doing the real thing once.

    from requires import requires

    @requires("userns", "crun")
    def test_same_bundle_under_crun(): ...

A test whose need is missing is skipped, and the skips are counted by need at the end of the run.
`MLENV_TEST_REQUIRE=userns,crun` (or `all`) turns those skips into failures, for machines that must have them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

requires = pytest.mark.requires

CATALOG = Path(__file__).parents[1] / "envs"


def _try(*args: str, script: str | None = None, timeout: float = 60) -> str | None:
    """Return why running `args` failed, or None where it succeeded."""
    try:
        done = subprocess.run(
            args, input=script, capture_output=True, text=True, timeout=timeout, check=False
        )
    except FileNotFoundError:
        return f"`{args[0]}` is not installed"
    except subprocess.TimeoutExpired:
        return f"`{' '.join(args)}` did not end within {timeout:g} s"
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip().splitlines()
    return f"`{' '.join(args)[:80]}`: {said[-1] if said else f'exit status {done.returncode}'}"


def _root() -> str | None:
    return None if os.geteuid() == 0 else f"this is uid {os.geteuid()}"


def _rootless() -> str | None:
    return None if os.geteuid() != 0 else "this is root"


def _userns() -> str | None:
    return _try("unshare", "--user", "--map-root-user", "true")


def _newuidmap() -> str | None:
    """Map a range of ids from /etc/subuid into a fresh user namespace, as a rootless container does."""
    user = pwd.getpwuid(os.getuid()).pw_name
    try:
        rows = [row.split(":") for row in Path("/etc/subuid").read_text().split()]
    except FileNotFoundError:
        return "there is no /etc/subuid"
    start = next((row[1] for row in rows if row[0] in (user, str(os.getuid()))), None)
    if start is None:
        return f"/etc/subuid has no range for {user}"
    child = subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()  # cat has answered: the namespace is there
        return _try("newuidmap", str(child.pid), "0", str(os.getuid()), "1", "1", start, "1000")


def _namespace(*options: str) -> list[str]:
    """Return `unshare` with rights over a new namespace, as root or as a user."""
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *as_user, *options]


def _overlay() -> str | None:
    with tempfile.TemporaryDirectory(prefix="mlenv-probe-") as root:
        for name in ("lower", "upper", "work", "merged"):
            (Path(root) / name).mkdir()
        options = f"lowerdir={root}/lower,upperdir={root}/upper,workdir={root}/work"
        why = _try(*_namespace("--mount"), "mount", "-t", "overlay", "-o", options, "o", f"{root}/merged")
        with contextlib.suppress(FileNotFoundError):
            (Path(root) / "work" / "work").chmod(0o700)
    return why


def _netns() -> str | None:
    """Make a bridge in a network namespace of our own."""
    return _try(*_namespace("--net"), "ip", "link", "add", "mlenvprobe", "type", "bridge")


def _cgroup() -> str | None:
    """Make a cgroup below our own, in any hierarchy that is mounted."""
    reasons = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for mount in _cgroup_mounts(controllers):
            probe = Path(mount) / path.lstrip("/") / f"mlenv-probe-{os.getpid()}"
            try:
                probe.mkdir()
                probe.rmdir()
            except OSError as error:
                reasons.append(str(error))
            else:
                return None
    return reasons[0] if reasons else "no cgroup hierarchy is mounted"


def _cgroup_mounts(controllers: str) -> list[str]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        kind, _, options = right.split(" ", 2)
        same = kind == "cgroup2" if not controllers else kind == "cgroup" and controllers in options
        if same:
            found.append(left.split()[4])
    return found


def _chromium() -> str | None:
    with tempfile.TemporaryDirectory(prefix="mlenv-probe-") as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        return _try("chromium", *flags, "--dump-dom", "about:blank")


def _index() -> str | None:
    """Fetch a small wheel from the package index that pip is configured for."""
    with tempfile.TemporaryDirectory(prefix="mlenv-probe-") as into:
        return _try(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", into, "idna"
        )


def _torch_cpu() -> str | None:
    """Find the PyTorch build that the catalog's CPU environment pins; PyPI does not have it."""
    script = (
        "from pathlib import Path\n"
        "from mlenv.lock.file import read_lock\n"
        "from mlenv.resolve.wheels import locate\n"
        f"lock = read_lock(Path({str(CATALOG / 'pytorch-2.13-cpu.lock.json')!r}))\n"
        "locate(lock)\n"
    )
    return _try(sys.executable, "-", script=script, timeout=120)


def _mirror() -> str | None:
    """Fetch the package lists of the mirrors apt is configured for, into a state directory of our own."""
    with tempfile.TemporaryDirectory(prefix="mlenv-probe-") as state:
        (Path(state) / "lists" / "partial").mkdir(parents=True)
        (Path(state) / "cache" / "archives" / "partial").mkdir(parents=True)
        options = [
            f"Dir::State={state}",
            f"Dir::Cache={state}/cache",
            "APT::Sandbox::User=",
            "Acquire::Languages=none",
        ]
        flags = [word for option in options for word in ("-o", option)]
        return _try("apt-get", *flags, "-o", "APT::Update::Error-Mode=any", "update", timeout=120)


def _tool(name: str, *args: str) -> Callable[[], str | None]:
    return functools.partial(_try, name, *(args or ("--version",)))


PROBES: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "rootless": _rootless,
    "userns": _userns,
    "newuidmap": _newuidmap,
    "overlay": _overlay,
    "netns": _netns,
    "cgroup": _cgroup,
    "chromium": _chromium,
    "index": _index,
    "mirror": _mirror,
    "torch-cpu": _torch_cpu,
    "gpu": _tool("nvidia-smi", "-L"),
    "cc": _tool("cc"),
    "crun": _tool("crun"),
    "runc": _tool("runc"),
    "skopeo": _tool("skopeo"),
    "umoci": _tool("umoci"),
    "podman": _tool("podman"),
    "busybox": _tool("busybox", "true"),
    "git": _tool("git"),
    "nft": _tool("nft"),
    "pasta": _tool("pasta"),
    "slirp4netns": _tool("slirp4netns"),
    "strace": _tool("strace", "-V"),
    "tmux": _tool("tmux", "-V"),
}
"""Each need and the probe that returns why it is missing, or None where it is there."""


@functools.cache
def missing(need: str) -> str | None:
    """Return why this machine lacks `need`, or None; asked of the machine once a run."""
    if need not in PROBES:
        raise pytest.UsageError(
            f"no probe for {need!r} in tests/requires.py; there are: {', '.join(sorted(PROBES))}"
        )
    return PROBES[need]()


def must_have(need: str) -> bool:
    """Return whether the one who runs the tests says that this machine has `need`."""
    wanted = os.environ.get("MLENV_TEST_REQUIRE", "").replace(" ", "").split(",")
    return need in wanted or "all" in wanted


def need(*names: str) -> None:
    """Skip the test that calls this where one of `names` is missing; for fixtures, where a mark cannot be."""
    for name in names:
        why = missing(name)
        if why is None:
            continue
        if must_have(name):
            pytest.fail(f"MLENV_TEST_REQUIRE asks for {name}: {why}", pytrace=False)
        pytest.skip(f"needs {name}: {why}")
