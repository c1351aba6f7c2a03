"""Bases: a root file system made of Debian packages, and further packages on top of one.

The essential packages are unpacked here so that dpkg can run at all; then dpkg itself installs every package
in a container, so that maintainer scripts, diversions, triggers and conffiles are what Debian means them to
be. What is left over from the work, and every trace of when it was done, is taken out again: equal packages
give equal trees.

Source: debootstrap(8), mmdebstrap(1) (order of the stages); Debian Policy 6 (maintainer scripts), 9.3.3.1
(policy-rc.d); reproducible-builds.org, SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.errors import ImageError
from mlenv.image.deb import Control, data_tar, read_control
from mlenv.image.digest import canonical_json, digest_of
from mlenv.image.store import remove_tree
from mlenv.image.unpack import unpack_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mlenv.image.runner import Runner
    from mlenv.lock.model import BaseLock, DebPackage

VERSION = 1
"""Version of what a base looks like; part of its key."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_DEBS = "/mnt"
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_POLICY = "#!/bin/sh\nexit 101\n"

_INSTALL_BASE = """\
set -e
dpkg="dpkg --force-unsafe-io --force-confold"
$dpkg --force-depends --install {first}
$dpkg --force-depends --install {essential}
$dpkg --force-depends --unpack {rest}
$dpkg --configure -a
"""

_INSTALL_APT = """\
set -e
exec apt-get install --yes --quiet --no-install-recommends --allow-downgrades \\
  -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Options::=--force-confold -o APT::Sandbox::User=root \\
  -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dpkg::Use-Pty=false {packages}
"""

_LEFTOVERS = (
    "etc/.pwd.lock",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "usr/sbin/policy-rc.d",
    "var/cache/apt/*.bin",
    "var/cache/apt/archives/lock",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/apt/lists/lock",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/systemd/catalog/database",
    "var/log/alternatives.log",
    "var/log/apt/*.log",
    "var/log/apt/*.log.xz",
    "var/log/bootstrap.log",
    "var/log/dpkg.log",
    "var/log/fontconfig.log",
)
_EMPTY_DIRECTORIES = ("dev", "proc", "run", "sys", "tmp")
_MOUNT_FILES = ("etc/hostname", "etc/hosts", "etc/resolv.conf")


def base_key(base: BaseLock) -> str:
    """Return the key of a base's tree."""
    packages = sorted(package.sha256 for package in base.packages)
    return digest_of(canonical_json({"base": VERSION, "suite": base.suite, "packages": packages}))


def apt_key(below: str, packages: Iterable[DebPackage]) -> str:
    """Return the key of a tree of packages installed over the tree `below`."""
    hashes = sorted(package.sha256 for package in packages)
    return digest_of(canonical_json({"apt": VERSION, "below": below, "packages": hashes}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Deb:
    """A fetched package: what is locked and where it lies on the host."""

    package: DebPackage
    path: Path

    @property
    def filename(self) -> str:
        """Return the name it has in the container."""
        version = self.package.version.replace(":", "%3a").replace("/", "_")
        return f"{self.package.name}_{version}_{self.package.architecture}.deb"


def build_base(debs: Sequence[Deb], work: Path, *, run: Runner) -> None:
    """Make the base's root file system in `work/fs` from its packages; bytecode goes to `work/pyc`.

    Raises: ImageError with the end of dpkg's log where a package cannot be installed.
    """
    root = work / "fs"
    started = _made(root)
    controls = {deb.filename: read_control(deb.path) for deb in debs}
    essential = essential_closure(controls)
    _prepare_root(root)
    _unpack([deb for deb in debs if deb.filename in essential], root)
    epoch = newest_mtime(root, before=started)
    names = sorted(controls)
    script = _INSTALL_BASE.format(
        first=_arguments(name for name in names if controls[name].name in {"base-passwd", "base-files"}),
        essential=_arguments(name for name in names if name in essential),
        rest=_arguments(name for name in names if name not in essential),
    )
    _install(script, debs, work, layers=(), upper=root, run=run, epoch=epoch)
    clear_leftovers(root)
    _finish_base(root)
    normalise(root, work / "pyc", epoch=epoch, started=started)


def add_packages(debs: Sequence[Deb], work: Path, *, layers: Sequence[Path], run: Runner) -> None:
    """Install packages over `layers` (the base at the bottom); `work/fs` becomes what that changes.

    Raises: ImageError with the end of apt's log where a package cannot be installed.
    """
    upper = work / "fs"
    started = _made(upper)
    epoch = int(layers[0].stat().st_mtime)
    script = _INSTALL_APT.format(packages=_arguments(sorted(deb.filename for deb in debs)))
    _install(script, debs, work, layers=layers, upper=upper, run=run, epoch=epoch)
    clear_leftovers(upper)
    drop_mount_points(upper)
    normalise(upper, work / "pyc", epoch=epoch, started=started)


def run_build_step(
    command: str, work: Path, *, layers: Sequence[Path], run: Runner, env: Mapping[str, str]
) -> None:
    """Run a spec's build step over `layers` with network access; `work/fs` becomes what it changes.

    Raises: ImageError with the end of its output where it fails.
    """
    upper, log = work / "fs", work / "log"
    started = _made(upper)
    epoch = int(layers[0].stat().st_mtime)
    settings = {**env, "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive", "SOURCE_DATE_EPOCH": str(epoch)}
    status = run.run(
        ["/bin/sh", "-c", command], layers=layers, upper=upper, env=settings, network=True, log=log
    )
    if status != 0:
        raise ImageError(
            f"the build step `{command}` ended with status {status}",
            cause=log_tail(log),
            hint="correct it in the spec",
        )
    clear_leftovers(upper)
    drop_mount_points(upper)
    normalise(upper, work / "pyc", epoch=epoch, started=started)


def _made(directory: Path) -> float:
    """Make a directory and return when, by the clock that files are stamped with: it runs behind time(2)."""
    directory.mkdir()
    return directory.stat().st_mtime


def essential_closure(controls: Mapping[str, Control]) -> set[str]:
    """Return the file names of the essential packages and of all they need among `controls`."""
    providers: dict[str, list[str]] = {}
    for filename, control in controls.items():
        for name in control.provides:
            providers.setdefault(name, []).append(filename)
    found: set[str] = set()
    waiting = [filename for filename, control in controls.items() if control.is_essential]
    while waiting:
        filename = waiting.pop()
        if filename in found:
            continue
        found.add(filename)
        for name in controls[filename].names_in("Depends") | controls[filename].names_in("Pre-Depends"):
            waiting.extend(providers.get(name, ()))
    return found


def _arguments(filenames: Iterable[str]) -> str:
    return " ".join(f"{_DEBS}/{name}" for name in filenames)


def _prepare_root(root: Path) -> None:
    """Make what no package can: the links of a merged /usr, and an empty dpkg database."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in (
        "var/lib/dpkg/info",
        "var/lib/dpkg/updates",
        "var/lib/dpkg/triggers",
        "mnt",
        *_EMPTY_DIRECTORIES,
    ):
        (root / name).mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    (root / "var/lib/dpkg/available").touch()


def _unpack(debs: Iterable[Deb], root: Path) -> None:
    def unpack(deb: Deb) -> None:
        with data_tar(deb.path) as tar:
            unpack_layer(tar.read, root, rename=merged_usr)

    with ThreadPoolExecutor(2, thread_name_prefix="unpack") as executor:
        # Reading the results raises what a thread raised.
        list(executor.map(unpack, debs))


def merged_usr(path: str) -> str:
    """Return where a package's path lies when /bin, /lib and others are links into /usr; "" for these."""
    first, below, _ = path.partition("/")
    if first not in _MERGED:
        return path
    return f"usr/{path}" if below else ""


def newest_mtime(root: Path, *, before: float) -> int:
    """Return the newest time of a file below `root` that is older than `before` (epoch seconds)."""
    times = (
        os.lstat(f"{directory}/{name}").st_mtime for directory, _, names in os.walk(root) for name in names
    )
    return max((int(each) for each in times if each < before), default=0)


def _install(
    script: str,
    debs: Sequence[Deb],
    work: Path,
    *,
    layers: Sequence[Path],
    upper: Path,
    run: Runner,
    epoch: int,
) -> None:
    shelf = work / "debs"
    shelf.mkdir()
    for deb in debs:
        _link_or_copy(deb.path, shelf / deb.filename)
    (upper / "usr/sbin").mkdir(parents=True, exist_ok=True)
    policy = upper / "usr/sbin/policy-rc.d"
    policy.write_text(_POLICY)
    policy.chmod(0o755)
    log = work / "log"
    env = {
        "PATH": PATH,
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "DEBIAN_FRONTEND": "noninteractive",
        "DEBCONF_NONINTERACTIVE_SEEN": "true",
        "SOURCE_DATE_EPOCH": str(epoch),
        "PERL_HASH_SEED": "0",
        "PYTHONHASHSEED": "0",
    }
    status = run.run(
        ["/bin/sh", "-c", script], layers=layers, upper=upper, env=env, mounts=[(shelf, _DEBS)], log=log
    )
    if status != 0:
        raise ImageError(
            f"installing {len(debs)} Debian packages failed with status {status}",
            cause=log_tail(log),
            hint="run the command again with -vv; resolve anew if a package is broken",
        )
    shutil.rmtree(shelf)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        # Another file system, or a file that is not ours to link.
        shutil.copyfile(source, target)


def log_tail(log: Path, lines: int = 12) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "no output"


# --- taking the traces out


def _finish_base(root: Path) -> None:
    """Set what a machine's first boot would set, for a root file system that never boots."""
    (root / "run/lock").mkdir()
    (root / "run/lock").chmod(0o1777)
    (root / "tmp").chmod(0o1777)
    for name in _MOUNT_FILES:
        (root / name).unlink(missing_ok=True)
        (root / name).touch()
    (root / "etc/machine-id").write_text("")
    # Without other user ids in the container apt cannot become `_apt` to download.
    config = root / "etc/apt/apt.conf.d/90sandbox"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('APT::Sandbox::User "root";\n')


def drop_mount_points(upper: Path) -> None:
    """Remove the empty files that bind mounts left in an upper directory; the base has them already."""
    for name in _MOUNT_FILES:
        path = upper / name
        if path.is_file() and path.stat().st_size == 0:
            path.unlink()


def clear_leftovers(root: Path) -> None:
    """Remove what the work left behind: locks, logs, caches, backups, the contents of mount points."""
    for pattern in _LEFTOVERS:
        for path in root.glob(pattern):
            if not _is_whiteout(path):
                path.unlink()
    for name in _EMPTY_DIRECTORIES:
        if (root / name).is_dir():
            for path in (root / name).iterdir():
                remove_tree(path)


def _is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def normalise(root: Path, pyc: Path, *, epoch: int, started: float) -> None:
    """Take out of a tree when it was made, and by which kind of overlay; bytecode moves to `pyc/`.

    Everything written after `started` gets the time `epoch`, both in seconds since the epoch.
    """
    _fix_shadow(root / "etc/shadow", epoch)
    move_bytecode(root, pyc)
    for directory, names, files in os.walk(root, topdown=False):
        for name in (*names, *files):
            _normalise_file(f"{directory}/{name}", epoch, started)
    _normalise_file(os.fspath(root), epoch, started)


def _normalise_file(path: str, epoch: int, started: float) -> None:
    status = os.lstat(path)
    for name in os.listxattr(path, follow_symlinks=False):
        _check_overlay_xattr(path, name)
    # Every group is root here, so a set-group-id file would give more than its package meant.
    if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_ISGID and not status.st_mode & stat.S_ISUID:
        os.chmod(path, stat.S_IMODE(status.st_mode) & ~stat.S_ISGID)  # noqa: PTH101
    if stat.S_ISDIR(status.st_mode) or status.st_mtime >= int(started):
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def _check_overlay_xattr(path: str, name: str) -> None:
    """Remove overlay's notes to itself; only "opaque" means the same in another mount."""
    space, _, note = name.partition(".overlay.")
    if space not in {"trusted", "user"} or note in {"", "opaque"}:
        return
    if note in {"redirect", "metacopy"}:
        raise ImageError(
            f"`{path}` refers to a lower layer ({name})",
            cause="the overlay was mounted with redirect_dir or metacopy",
        )
    os.removexattr(path, name, follow_symlinks=False)


def _fix_shadow(path: Path, epoch: int) -> None:
    """Set the day of the last password change, which useradd takes from the clock (shadow(5))."""
    if path.is_file():
        mode = stat.S_IMODE(path.stat().st_mode)
        path.write_text(re.sub(r"(?m)^([^:\n]*:[^:\n]*:)\d+:", rf"\g<1>{epoch // 86400}:", path.read_text()))
        path.chmod(mode)


def move_bytecode(root: Path, pyc: Path) -> None:
    """Move every `__pycache__` of a tree to the same place below `pyc`."""
    for directory, names, _ in os.walk(root):
        if "__pycache__" in names:
            names.remove("__pycache__")
            source = Path(directory, "__pycache__")
            target = pyc / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
