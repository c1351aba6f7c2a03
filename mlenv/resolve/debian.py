"""Debian packages, pinned with the host's apt as the solver.

apt runs as an ordinary user on directories of our own with an empty dpkg status: it reads the target suite's
signed lists, solves, and prints what it would fetch. The host's proxies, certificates and keys apply; its
packages, pins and hooks do not. Source: apt.conf(5), apt-get(8), apt-patterns(7).
"""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import unquote

from mlenv import paths
from mlenv.errors import IndexUnreachableError, PackageNotFoundError, ResolveError
from mlenv.lock.model import DebPackage
from mlenv.resolve.indexes import redacted
from mlenv.resolve.mirrors import VARIABLE, Archive, archives

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A Debian release that can be a base; `extras`: what its base holds besides `BASE_PACKAGES`."""

    base: str
    codename: str
    extras: tuple[str, ...] = ()


SUITES = (
    Suite(base="debian:13", codename="trixie"),
    # init-system-helpers wants usrmerge or usr-is-merged: ours is merged, as debootstrap's
    Suite(base="debian:12", codename="bookworm", extras=("python3-distutils", "usr-is-merged")),
    Suite(base="debian:11", codename="bullseye", extras=("python3-distutils",)),
)
"""The bases that can be built, newest first."""

BASES = tuple(suite.base for suite in SUITES)
BASE_PACKAGES = ("?essential", "apt", "ca-certificates", "procps", "python3")
"""What every base holds, as apt's arguments: the Essential packages and what an environment needs to run."""

_URI = re.compile(
    r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) (?:SHA256:(?P<sha256>[0-9a-f]{64}))?\s*$", re.MULTILINE
)
_UNKNOWN = re.compile(
    r"E: (?:Unable to locate package (\S+)|Couldn't find any package by \w+ '([^']+)'"
    r"|Package '([^']+)' has no|Version '[^']+' for '([^']+)' was not found)"
)
_NO_RELEASE = re.compile(r"The repository '\S+ (\S+) Release' (?:does not have|no longer has) a Release file")
_UPSTREAM = re.compile(r"(?:\d+:)?(\d+\.\d+\.\d+)")


def suite_of(base: str) -> Suite:
    """Return the suite of a base name. Raises: ResolveError where there is none."""
    for suite in SUITES:
        if suite.base == base:
            return suite
    raise ResolveError(
        f"`{base}` cannot be built", cause=f"the bases are {', '.join(BASES)}", code="unknown-base"
    )


def mirrors(base: str, *, mirror: str | None = None) -> Mapping[str, str]:
    """Return the roots of Debian's archives on this host for a base: "main" and "security" to an address.

    Where the host knows no security mirror, main's stands in, so that an error names an address.
    """
    suite_of(base)
    roots = {archive.name: archive.root for archive in archives(mirror)}
    return {"security": roots["main"], **roots}


def deb_url(package: DebPackage, roots: Mapping[str, str]) -> str:
    """Return where a package of a lock is fetched, given `mirrors()`."""
    return f"{roots[package.archive]}/{package.path}"


def python_version(packages: Sequence[DebPackage], minor: str) -> str:
    """Return the full version of the base's Python ("3.11.2"), from the package that holds it."""
    for package in packages:
        found = _UPSTREAM.match(package.version)
        if package.name == f"python{minor}-minimal" and found:
            return found.group(1)
    raise ResolveError(
        f"the base holds no Python {minor}", cause=f"there is no package python{minor}-minimal"
    )


# --- apt


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """apt over one suite's lists; made by `solver`."""

    configuration: Path
    archives: tuple[Archive, ...]
    codename: str

    def base(self, suite: Suite) -> tuple[DebPackage, ...]:
        """Return the packages of a bare base, sorted by name."""
        return self.install((*BASE_PACKAGES, *suite.extras))

    def additions(self, base: Sequence[DebPackage], names: Sequence[str]) -> tuple[DebPackage, ...]:
        """Return what installing `names` adds to a base whose packages stay as they are."""
        if not names:
            return ()
        held = {(package.name, package.architecture) for package in base}
        pinned = [f"{package.name}={package.version}" for package in base]
        packages = self.install((*pinned, *names))
        return tuple(package for package in packages if (package.name, package.architecture) not in held)

    def install(self, names: Sequence[str]) -> tuple[DebPackage, ...]:
        """Return everything that installing `names` into an empty system fetches, sorted by name."""
        return self._remembered(names) or self._solve(names)

    def _solve(self, names: Sequence[str]) -> tuple[DebPackage, ...]:
        done = _apt("apt-get", "install", "--print-uris", "--yes", *names, configuration=self.configuration)
        if done.returncode:
            raise self._install_error(done.stderr, done.stdout)
        found = [self._package(line) for line in _URI.finditer(done.stdout)]
        packages = tuple(sorted(found, key=lambda package: (package.name, package.architecture)))
        kept = self._solution(names)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps([asdict(package) for package in packages]))
        return packages

    def _remembered(self, names: Sequence[str]) -> tuple[DebPackage, ...]:
        """Return the solution of an earlier run over the same lists, or nothing."""
        try:
            rows = json.loads(self._solution(names).read_text())
        except (FileNotFoundError, ValueError):  # none, or its writing was cut short
            return ()
        return tuple(DebPackage(**row) for row in rows)

    def _solution(self, names: Sequence[str]) -> Path:
        """Return where the solution for `names` is kept: the signed Release files stand for the lists."""
        root = self.configuration.parent
        content = sha256(repr(tuple(names)).encode())
        for release in sorted((root / "lists").glob("*Release")):
            content.update(release.read_bytes())
        return root / "solutions" / f"{content.hexdigest()}.json"

    def _package(self, line: re.Match[str]) -> DebPackage:
        name, version, architecture = (unquote(part) for part in line["file"].removesuffix(".deb").split("_"))
        archive = next(row for row in self.archives if line["uri"].startswith(f"{_for_apt(row.root)}/"))
        if line["sha256"] is None:
            raise ResolveError(f"`{archive.root}` gives no SHA256 for {name} {version}", code="no-hash")
        return DebPackage(
            name=name,
            version=version,
            architecture=architecture,
            path=unquote(line["uri"].removeprefix(f"{_for_apt(archive.root)}/")),
            archive=archive.name,
            sha256=line["sha256"],
            size=int(line["size"]),
        )

    def _install_error(self, said: str, listed: str) -> ResolveError:
        unknown = [next(filter(None, names)) for names in _UNKNOWN.findall(said)]
        if unknown:
            near = self._near(unknown[0])
            return PackageNotFoundError(
                f"Debian {self.codename} has no package `{unknown[0]}`",
                cause=_sentences(said),
                hint=f"near it are {', '.join(near)}" if near else "look for it with `apt-cache search`",
            )
        return ResolveError(
            f"these packages cannot be installed together on Debian {self.codename}",
            cause="\n".join((*_unmet(listed), _sentences(said))),
            hint="remove one of the packages that the cause names from `apt`",
            code="apt-conflict",
        )

    def _near(self, name: str) -> list[str]:
        """Return existing package names like `name`: those that hold it or begin like it are compared."""
        done = _apt("apt-cache", "pkgnames", configuration=self.configuration)
        stem = name.rstrip("0123456789.-")[:3]
        similar = [other for other in done.stdout.split() if other.startswith(stem) or name in other]
        return difflib.get_close_matches(name, sorted(similar), n=4)


@contextmanager
def solver(suite: Suite, *, architecture: str, mirror: str | None = None) -> Iterator[Solver]:
    """Give apt over the suite's lists, brought up to date; unchanged lists are not fetched again.

    Raises: IndexUnreachableError where a mirror does not answer, ResolveError where apt is missing or refuses
    its signature.
    """
    if shutil.which("apt-get") is None:
        raise ResolveError(
            "apt is needed to choose the packages of a Debian base",
            cause="there is no `apt-get` on PATH",
            hint="resolve on a Debian or Ubuntu machine and commit the lock: using a lock needs no apt",
            code="apt-missing",
        )
    places = archives(mirror)
    identity = repr(
        (suite.codename, architecture, [(row.name, row.root, sorted(row.options.items())) for row in places])
    )
    root = (
        paths.cache_dir()
        / "apt"
        / f"{suite.codename}-{architecture}-{sha256(identity.encode()).hexdigest()[:12]}"
    )
    paths.private_dir(root)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two resolutions share the lists, one after the other
        configuration = _configure(root, suite, places, architecture)
        _update(root, suite, places, configuration)
        yield Solver(configuration=configuration, archives=places, codename=suite.codename)


def _configure(root: Path, suite: Suite, places: Sequence[Archive], architecture: str) -> Path:
    for folder in ("lists/partial", "cache/archives/partial", "sources.list.d", "state", "log", "tmp"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "status").write_text("")
    (root / "sources.list.d" / "mlenv.sources").write_text(
        _sources(suite, places, architecture, updates=True)
    )
    configuration = root / "apt.conf"
    configuration.write_text(_CONFIGURATION.format(root=root, architecture=architecture))
    return configuration


_CONFIGURATION = """\
#clear APT::Architectures;
#clear APT::Update;
#clear APT::Default-Release;
#clear DPkg;
Dir::State "{root}/state";
Dir::State::lists "{root}/lists";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Log "{root}/log";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{root}/sources.list.d";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Solver "internal";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::ForceHash "SHA256";
Acquire::GzipIndexes "false";
"""
"""apt's configuration, read after the host's own; braces doubled for str.format."""


def _sources(suite: Suite, places: Sequence[Archive], architecture: str, *, updates: bool) -> str:
    """Return the deb822 sources of a suite: main with its updates, and security where the host has it."""
    stanzas = []
    for archive in places:
        security = archive.name == "security"
        names = [f"{suite.codename}-security"] if security else [suite.codename, f"{suite.codename}-updates"]
        fields = {
            "Types": "deb",
            "URIs": _for_apt(archive.root),
            "Suites": " ".join(names if security or updates else names[:1]),
            "Components": "main",
            "Architectures": architecture,
            "Targets": "Packages",
            "Languages": "none",
            **archive.options,
        }
        stanzas.append("".join(f"{key}: {value}\n" for key, value in fields.items()))
    return "\n".join(stanzas)


def _for_apt(root: str) -> str:
    """Return a root as apt is given it: it prints no address of a package that it finds in a file: mirror."""
    return root.replace("file:", "copy:", 1) if root.startswith("file:") else root


def _update(root: Path, suite: Suite, places: Sequence[Archive], configuration: Path) -> None:
    done = _apt("apt-get", "update", configuration=configuration)
    said = redacted(done.stderr)
    missing = set(_NO_RELEASE.findall(said))
    if missing == {f"{suite.codename}-updates"}:  # an archived release has lost its updates suite
        architecture = re.search(r'^APT::Architecture "(\w+)"', configuration.read_text(), re.MULTILINE)
        assert architecture is not None  # noqa: S101 - written by _configure
        sources = _sources(suite, places, architecture.group(1), updates=False)
        (root / "sources.list.d" / "mlenv.sources").write_text(sources)
        done = _apt("apt-get", "update", configuration=configuration)
        said = redacted(done.stderr)
    if done.returncode or re.search(
        r"^(E:|W: (Failed to fetch|Some index files failed))", said, re.MULTILINE
    ):
        raise _update_error(said, suite, places)


def _update_error(said: str, suite: Suite, places: Sequence[Archive]) -> ResolveError:
    cause = _sentences(said)
    where = " and ".join(f"`{redacted(row.root)}`" for row in places)
    name = f"--mirror URL or {VARIABLE}=URL"
    if re.search(
        r"NO_PUBKEY|EXPKEYSIG|BADSIG|not signed|[Ss]ignatures? (couldn't|were invalid)|Signed-By|sqv|keyring",
        said,
    ):
        return ResolveError(
            f"the Debian {suite.codename} lists are not signed by a key this host trusts",
            cause=cause,
            hint=f"`apt-get install debian-archive-keyring` brings the newest keys; or use {name}",
            code="mirror-signature",
        )
    if "Release file for" in said and "expired" in said:
        return ResolveError(
            f"the Debian {suite.codename} lists on {where} are too old", cause=cause, code="mirror-expired",
            hint="name a mirror that is kept up to date: " + name,
        )  # fmt: skip
    if _NO_RELEASE.search(said) or "404" in said:
        return IndexUnreachableError(
            f"the mirror {where} does not have Debian {suite.codename}",
            cause=cause,
            hint=f"name a mirror that has it: {name}; or choose another `base`",
            code="suite-not-on-mirror",
        )
    return IndexUnreachableError(
        f"the Debian mirror {where} cannot be reached",
        cause=cause,
        hint=f"check the network and apt's proxy (`apt-config dump Acquire`), or name another mirror: {name}",
        code="mirror-unreachable",
    )


def _unmet(listed: str) -> list[str]:
    """Return the lines in which apt-get lists unmet dependencies on its stdout."""
    _, _, after = listed.partition("The following packages have unmet dependencies:\n")
    return [line.strip() for line in after.splitlines() if line.startswith(" ")]


def _sentences(said: str) -> str:
    """Return apt's errors and warnings, each once, without their marks; everything where none is marked."""
    lines = [line for line in redacted(said).splitlines() if line.strip()]
    marked = [line[3:] for line in lines if line.startswith(("E: ", "W: "))]
    errors = [line[3:] for line in lines if line.startswith("E: ")]
    chosen = [line for line in (marked or lines) if not line.startswith(("Some index files", "Problem with"))]
    return "\n".join(dict.fromkeys(chosen or errors))


def _apt(command: str, *args: str, configuration: Path) -> subprocess.CompletedProcess[str]:
    """Run an apt command quietly, in plain English so that its errors can be told apart."""
    temporary = str(configuration.parent / "tmp")  # gpgv's files: /tmp need not be writable for a user
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", "TMPDIR": temporary}
    return subprocess.run(
        [command, "-q", "-c", str(configuration), *args],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
