"""Where Debian packages come from on this host: read from its apt configuration, or named by the user.

A lock keeps only the word "main" or "security" for a package; the roots behind these words are found here. No
mirror's name is known to mlenv: without any in the host's apt configuration, debootstrap's own default is
taken. Source: sources.list(5).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlenv.errors import IndexUnreachableError, ResolveError
from mlenv.resolve.indexes import redacted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

VARIABLE = "MLENV_DEBIAN_MIRROR"
"""Names the mirror of Debian's main archive, and after a space the one of its security archive."""

_RELEASES = (
    "bullseye", "bookworm", "trixie", "forky", "sid", "unstable", "testing",
    "stable", "oldstable", "oldoldstable",
)  # fmt: skip
_KEYRINGS = tuple(
    Path("/usr/share/keyrings") / name
    for name in ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
)
_DEBOOTSTRAP = ("/usr/sbin/debootstrap", "/usr/bin/debootstrap")
_DEFAULT_MIRROR = re.compile(r'^\s*(?:DEF_MIRROR=|default_mirror\s+)"?([a-z]+://[^"\s]+)', re.MULTILINE)

_COPIED = {
    "signed-by": "Signed-By",
    "trusted": "Trusted",
    "allow-insecure": "Allow-Insecure",
    "allow-weak": "Allow-Weak",
    "check-valid-until": "Check-Valid-Until",
    "check-date": "Check-Date",
    "valid-until-max": "Valid-Until-Max",
}
"""Options of a source that go with its mirror, as one-line sources and as deb822 ones spell them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AptSource:
    """One entry of apt's sources; `options` by their deb822 field names."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """One of Debian's archives, "main" or "security", at its root here, with the options that go with it."""

    name: str
    root: str
    options: Mapping[str, str] = field(default_factory=dict)


def archives(mirror: str | None = None) -> tuple[Archive, ...]:
    """Return the archives, main first.

    They are those of `mirror`, else of MLENV_DEBIAN_MIRROR, of apt's sources, of debootstrap.
    `mirror`: the root of the main archive and, after a space, of the security archive. Raises: ResolveError
    with code `no-mirror` where the host names none.
    """
    named = (mirror or os.environ.get(VARIABLE, "")).replace(",", " ").split()
    sources = list(host_sources())
    if named:
        return _named(named, sources)
    main = _best_main(sources)
    if main is None:
        return _of_debootstrap()
    return (main, *_security(sources))


def _named(roots: Sequence[str], sources: Sequence[AptSource]) -> tuple[Archive, ...]:
    """Return the archives the user named; the security archive falls back to the host's."""
    main = Archive(name="main", root=_root(roots[0]), options=_options_of(roots[0], sources))
    if len(roots) > 1:
        return (main, Archive(name="security", root=_root(roots[1]), options=_options_of(roots[1], sources)))
    return (main, *_security(sources))


def _options_of(root: str, sources: Sequence[AptSource]) -> Mapping[str, str]:
    same = [source for source in sources if root.rstrip("/") in (uri.rstrip("/") for uri in source.uris)]
    return same[0].options if same else _keyring()


def _keyring() -> dict[str, str]:
    found = next((str(path) for path in _KEYRINGS if path.exists()), None)
    return {"Signed-By": found} if found else {}


def _best_main(sources: Sequence[AptSource]) -> Archive | None:
    """Return Debian's main archive among the host's sources.

    Others publish under Debian's release names too. Debian's own has an -updates suite at the same address,
    or is signed by its keyring or by one trusted for everything.
    """
    fitting = [source for source in sources if "main" in source.components and _names(source, "")]
    with_updates = {uri for source in sources if _names(source, "-updates") for uri in source.uris}

    def rank(source: AptSource) -> tuple[bool, bool]:
        signed_by = source.options.get("Signed-By", "debian-archive")
        return (not with_updates.intersection(source.uris), "debian-archive" not in signed_by)

    if not fitting:
        return None
    best = min(fitting, key=rank)
    return Archive(name="main", root=_root(best.uris[0]), options=best.options)


def _security(sources: Sequence[AptSource]) -> tuple[Archive, ...]:
    for source in sources:
        if "main" in source.components and (_names(source, "-security") or _names(source, "/updates")):
            return (Archive(name="security", root=_root(source.uris[0]), options=source.options),)
    return ()


def _names(source: AptSource, suffix: str) -> bool:
    return any(suite.rstrip("/") == f"{release}{suffix}" for suite in source.suites for release in _RELEASES)


def _of_debootstrap() -> tuple[Archive, ...]:
    """Return the archive that the host's debootstrap would use, and the security archive beside it."""
    script = next((path for path in map(Path, _DEBOOTSTRAP) if path.exists()), None)
    found = _DEFAULT_MIRROR.search(script.read_text(errors="replace")) if script else None
    if found is None:
        raise ResolveError(
            "no Debian mirror is known on this host",
            cause="apt's sources name none and debootstrap is not installed",
            hint="`apt-get install debootstrap debian-archive-keyring`, or name one: "
            f"`--mirror URL` or {VARIABLE}=URL",
            code="no-mirror",
        )
    root = found.group(1).rstrip("/")
    options = _keyring()
    return (
        Archive(name="main", root=root, options=options),
        Archive(name="security", root=f"{root}-security", options=options),
    )


# --- mirror lists


def _root(uri: str) -> str:
    """Return an address that can be fetched from: a mirror list is replaced by its first entry.

    Source: apt-transport-mirror(1).
    """
    scheme, _, rest = uri.partition(":")
    if scheme != "mirror" and not scheme.startswith("mirror+"):
        return uri.rstrip("/")
    address = f"{'http' if scheme == 'mirror' else scheme.removeprefix('mirror+')}:{rest}"
    lines = [line.split("#")[0].split("\t") for line in _read(address).splitlines()]
    entries = [
        (_priority(fields[1:]), place, fields[0].strip())
        for place, fields in enumerate(lines)
        if fields[0].strip()
    ]
    if not entries:
        raise ResolveError(f"the mirror list `{redacted(uri)}` is empty", code="no-mirror")
    return min(entries)[2].rstrip("/")


def _read(address: str) -> str:
    if address.startswith("file:"):
        return Path("/" + address.removeprefix("file:").lstrip("/")).read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310 - named in the host's apt sources
            text: bytes = answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise IndexUnreachableError(
            f"the mirror list `{redacted(address)}` cannot be read",
            cause=str(error),
            code="mirror-unreachable",
        ) from error
    return text.decode()


def _priority(fields: Sequence[str]) -> int:
    words = " ".join(fields).split()
    return next(
        (int(word.removeprefix("priority:")) for word in words if word.startswith("priority:")), 1 << 30
    )


# --- apt's sources


def host_sources() -> Iterator[AptSource]:
    """Yield the entries of the host's apt sources that are in use."""
    for path in _source_files():
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, PermissionError):
            continue
        yield from (deb822_sources(text) if path.suffix == ".sources" else one_line_sources(text))


def _source_files() -> list[Path]:
    """Return the files apt reads, as its own configuration names them."""
    main, parts = Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d")
    if shutil.which("apt-config"):
        keys = ["MAIN", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"]
        done = subprocess.run(["apt-config", "shell", *keys], capture_output=True, text=True, check=False)
        said = dict(re.findall(r"^(\w+)='(.*)'$", done.stdout, re.MULTILINE))
        main, parts = Path(said.get("MAIN", main)), Path(said.get("PARTS", parts))
    below = sorted(parts.iterdir()) if parts.is_dir() else []
    return [main, *(path for path in below if path.suffix in (".list", ".sources"))]


def one_line_sources(text: str) -> Iterator[AptSource]:
    """Yield the entries of a sources.list: `deb [option=value …] uri suite component…`."""
    for line in text.splitlines():
        found = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if found is None:
            continue
        pairs = (word.split("=", 1) for word in (found.group(1) or "").split() if "=" in word)
        options = {_COPIED[key.lower()]: value for key, value in pairs if key.lower() in _COPIED}
        yield AptSource(
            uris=(found.group(2),),
            suites=(found.group(3),),
            components=tuple(found.group(4).split()),
            options=options,
        )


def deb822_sources(text: str) -> Iterator[AptSource]:
    """Yield the entries of a .sources file; a key embedded in Signed-By stays as it is written."""
    for stanza in re.split(
        r"\n[ \t]*\n", "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    ):
        fields = _fields(stanza)
        if (
            "deb" not in fields.get("types", "").split()
            or fields.get("enabled", "yes").strip().lower() == "no"
        ):
            continue
        yield AptSource(
            uris=tuple(fields.get("uris", "").split()),
            suites=tuple(fields.get("suites", "").split()),
            components=tuple(fields.get("components", "").split()),
            options={name: fields[key].strip() for key, name in _COPIED.items() if key in fields},
        )


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    key = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t") and key:
            fields[key] += "\n" + line
        elif ":" in line:
            key, _, value = line.partition(":")
            key = key.strip().lower()
            fields[key] = value.strip()
    return fields
