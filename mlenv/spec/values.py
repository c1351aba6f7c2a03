"""The texts of a spec and of the command line as values: sizes, ports, GPUs, versions, names.

Every function takes the text as it was written and returns the value, or raises BadValueError (a ValueError)
with what is wrong and a one-line remedy. Nothing here imports pydantic, for the sake of `mlenv run -p`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlenv.spec.faults import quote

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    GpuMode = Literal["auto", "all", "none", "count", "ids"]

LOCALHOST = "127.0.0.1"

NETWORKS = ("private", "none", "host")

DEBIAN = {"11": "bullseye", "12": "bookworm", "13": "trixie"}
"""Debian releases that a base can be made of. Source: https://www.debian.org/releases/."""

UNITS = {
    "": 1, "b": 1,
    "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
"""Bytes of each unit: kB, MB, GB, TB are powers of 1000 (SI), KiB, MiB, GiB, TiB powers of 1024 (IEC
80000-13), and one letter alone is a power of 1024, as in Docker's `-m 512m`."""

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")
_PORT = re.compile(
    r"(?:(?P<ip>\[[^\]]*\]|[^:\[\]]*):)?(?P<host>[^:]*):(?P<container>[^:/]*)(?:/(?P<protocol>.*))?"
)
_UUID = re.compile(r"(GPU|MIG)-[0-9A-Za-z][0-9A-Za-z/-]*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")
_APT = re.compile(r"[a-z0-9][a-z0-9+.-]+(=([0-9]+:)?[0-9][A-Za-z0-9.+~-]*)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOCAL = re.compile(r"(\.{1,2})(/[^\[\]]*)?(\[[A-Za-z0-9._, -]*\])?")
_MOUNT = re.compile(r"(?P<source>[^:]+):(?P<target>[^:]+)(:(?P<mode>ro|rw))?")
_MIRROR = re.compile(r"(https?://(?P<credentials>[^/@\s]*@)?[^/@\s]+|file://)(/\S*)?")
_REFERENCE = re.compile(
    r"(?:(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
"""Source: github.com/distribution/reference, `reference.go` (its grammar in the package comment)."""

_LAST_PORT = 65535
_LEAST_CPUS = 0.01
"""The kernel's least quota: 1 ms in each 100 ms. Source: sched-bwc.rst."""


class BadValueError(ValueError):
    """A text that is not the value its place wants; `hint` says what to write."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, kw_only=True, slots=True)
class PortSpec:
    """A container's port and where on the host it appears."""

    host_ip: str = LOCALHOST
    host_port: int
    container_port: int
    protocol: str = "tcp"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSelection:
    """Which GPUs a container gets: `count` with mode "count", `ids` with "ids"; `memory` in bytes."""

    mode: GpuMode = "auto"
    count: int | None = None
    ids: tuple[str, ...] = ()
    memory: int | None = None


def did_you_mean(text: str, valid: Iterable[str]) -> str | None:
    """Return the nearest of the valid names as a hint, None where nothing is near."""
    from difflib import get_close_matches

    names = {name.lower(): name for name in valid}
    near = get_close_matches(text.lower(), names, n=1, cutoff=0.6)
    return f"did you mean `{names[near[0]]}`?" if near else None


def one_of(text: str, valid: Iterable[str]) -> str:
    """Return a text that is one of the valid words."""
    words = tuple(valid)
    if text in words:
        return text
    hint = did_you_mean(text, words) or "write one of them"
    raise BadValueError(f"{quote(text)} is none of {', '.join(words)}", hint)


def parse_size(text: str) -> int:
    """Return the bytes that a size means: 16GB = 16 * 10^9, 16GiB and Docker's 16g = 16 * 2^30."""
    from decimal import Decimal

    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadValueError(
            f"{quote(text)} is not a size", "write a number and a unit: `16GB`, `512MiB` or `512m`"
        )
    number, unit = match.groups()
    if unit.lower() not in UNITS:
        raise BadValueError(
            f"{quote(unit)} is not a unit of size", "use kB, MB, GB, TB or KiB, MiB, GiB, TiB"
        )
    size = int(Decimal(number) * UNITS[unit.lower()])
    if not 0 < size < 2**63:
        raise BadValueError(f"{quote(text)} is not a size that can be", "write a size such as `16GB`")
    return size


def parse_port(text: str) -> PortSpec:
    """Return what `[ADDRESS:]HOST:CONTAINER[/tcp|udp]` publishes. Source: docker-run(1), `--publish`."""
    match = _PORT.fullmatch(text)
    if match is None:
        is_single = bool(re.fullmatch(r"[0-9]+(/[a-z]+)?", text))
        hint = (
            f'write `"{text.split("/", maxsplit=1)[0]}:{text}"`'
            if is_single
            else 'write `"8097:8097"`, the host\'s port first'
        )
        raise BadValueError(f"{quote(text)} is not HOST:CONTAINER", hint)
    return PortSpec(
        host_ip=_address(match["ip"]),
        host_port=_port_number(match["host"], "host", text),
        container_port=_port_number(match["container"], "container", text),
        protocol=one_of(match["protocol"], ("tcp", "udp")) if match["protocol"] is not None else "tcp",
    )


def _address(text: str | None) -> str:
    if text is None:
        return LOCALHOST
    bare = text[1:-1] if text.startswith("[") else text
    try:
        import ipaddress

        return str(ipaddress.ip_address(bare))
    except ValueError:
        hint = f"write `{LOCALHOST}`, `0.0.0.0` or `[::1]`, or leave the address out"
        raise BadValueError(f"{quote(text)} is not an IP address", hint) from None


def _port_number(text: str, side: str, whole: str) -> int:
    if re.fullmatch(r"[0-9]{1,5}-[0-9]{1,5}", text):
        raise BadValueError(f"{quote(whole)} is a range of ports", "write one entry for each port")
    if not re.fullmatch(r"[0-9]+", text) or not text.isascii():
        raise BadValueError(f"{quote(whole)} has no number as its {side} port", 'write `"8097:8097"`')
    if len(text) > len(str(_LAST_PORT)) or not 1 <= int(text) <= _LAST_PORT:
        raise BadValueError(
            f"the {side} port {quote(text)} is not within 1 to {_LAST_PORT}", "choose another port"
        )
    return int(text)


def parse_gpus(text: str) -> GpuSelection:
    """Return what `auto`, `all`, `none`, a number, or Docker's `device=0,GPU-…` selects."""
    if text in ("auto", "all", "none"):
        return GpuSelection(mode=text)  # type: ignore[arg-type]  # one of its words, as just checked
    if text.startswith("device="):
        return gpu_ids(text.removeprefix("device=").split(","))
    if re.fullmatch(r"[0-9]+", text):
        return GpuSelection(mode="count", count=whole_number(text, hint="write `none` for no GPU"))
    hint = did_you_mean(text, ("auto", "all", "none")) or "write `auto`, `all`, `none`, a number, or `[0, 1]`"
    raise BadValueError(f"{quote(text)} selects no GPU", hint)


def gpu_ids(ids: Iterable[str]) -> GpuSelection:
    """Return the selection of GPUs by index or UUID."""
    found = tuple(gpu_id(text) for text in ids)
    if not found:
        raise BadValueError("the list of GPUs is empty", "write `none` for no GPU")
    twice = next((text for text in found if found.count(text) > 1), None)
    if twice:
        raise BadValueError(f"the GPU {quote(twice)} is listed twice", "list each once")
    return GpuSelection(mode="ids", ids=found)


def gpu_id(text: str) -> str:
    """Return a GPU's index or UUID. Source: nvidia-smi(1), `-i`."""
    text = text.strip()
    if re.fullmatch(r"0|[1-9][0-9]{0,3}", text) or _UUID.fullmatch(text):
        return text
    raise BadValueError(f"{quote(text)} is not a GPU's index or UUID", "`nvidia-smi -L` lists both")


def whole_number(text: str, *, hint: str = "write a number such as `1`") -> int:
    """Return a whole number, 1 or more."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise BadValueError(f"{quote(text)} is not a whole number above 0", hint)
    return int(text)


def cpus(text: str) -> float:
    """Return a number of CPUs, which need not be whole. Source: docker-run(1), `--cpus`."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) < _LEAST_CPUS:
        raise BadValueError(f"{quote(text)} is not a number of CPUs", "write a number such as `4` or `1.5`")
    return float(text)


def boolean(text: str) -> bool:
    """Return `true` or `false`. Source: YAML 1.2.2, section 10.2.1.2."""
    if text.lower() in ("true", "false") and text in (text.lower(), text.upper(), text.capitalize()):
        return text.lower() == "true"
    meant = "true" if text.lower() in ("yes", "on", "1", "y", "ro") else "false"
    raise BadValueError(f"{quote(text)} is neither true nor false", f"write `{meant}`")


def name(text: str) -> str:
    """Return a name that an environment, its container and its kernelspec can have."""
    if _NAME.fullmatch(text):
        return text
    near = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")[:63]
    hint = f"write `{near}`" if near else "write a name such as `train`"
    raise BadValueError(f"{quote(text)} is not a name: letters, digits, `-`, `_` and `.`, 63 at most", hint)


def line(text: str) -> str:
    """Return a text of one line that can be shown."""
    if text.strip() and text.isprintable():
        return text
    raise BadValueError("this must be one line of visible text", "write it on one line")


def python(text: str) -> str:
    """Return a Python version or range."""
    if re.fullmatch(r"2(\.[0-9]+)*", text):
        raise BadValueError(f"Python {text} is not supported", "write a version of Python 3")
    return version_or_range(text)


def pytorch(text: str) -> str | None:
    """Return a PyTorch version or range, None for the word `none`."""
    return None if text == "none" else version_or_range(text)


def version_or_range(text: str) -> str:
    """Return a version or a range of versions. Source: PyPA version specifiers."""
    if text and (_is_version(text) if text[0].isdigit() else _is_range(text)):
        return text
    found = re.search(r"[0-9]+(\.[0-9]+)*", text)
    hint = f'write `"{found.group()}"` or a range like `">={found.group()}"`' if found else 'write `"3.11"`'
    raise BadValueError(f"{quote(text)} is neither a version nor a range", hint)


def _is_version(text: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def _is_range(text: str) -> bool:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        return False
    return bool(text.strip())


def cuda(text: str) -> str:
    """Return a CUDA version, or `cpu`."""
    if text == "cpu" or re.fullmatch(r"[0-9]+\.[0-9]+(\.[0-9]+)?", text):
        return text
    short = re.fullmatch(r"(?:cu|cuda)?-?([0-9]+)([0-9])", text)
    if short and text.startswith("cu"):
        hint = f'write `"{short[1]}.{short[2]}"`'
    elif _VERSION.fullmatch(text):
        hint = f'write the minor version too, as in `"{text.split(".", maxsplit=1)[0]}.1"`'
    else:
        hint = did_you_mean(text, ("cpu",)) or 'write a version such as `"10.1"`, or `cpu`'
    raise BadValueError(f"{quote(text)} is not a CUDA version", hint)


def cudnn(text: str) -> str:
    """Return a cuDNN version or the beginning of one."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+){0,3}", text):
        return text
    raise BadValueError(f"{quote(text)} is not a cuDNN version", 'write `"7.6"` or `"7"`')


def requirement(text: str) -> str:
    """Return a requirement as pip reads it, or a local package's path. Source: PEP 508."""
    if text.startswith(".") and (text in (".", "..") or text.startswith(("./", "../", ".[", "..["))):
        if _LOCAL.fullmatch(text):
            return text
        raise BadValueError(
            f"{quote(text)} is not a local package's path", "write `./libs/mypkg` or `./libs/mypkg[extra]`"
        )
    if hint := _not_a_requirement(text):
        raise BadValueError(f"{quote(text)} is not a requirement", hint)
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        found = Requirement(text)
    except InvalidRequirement as fault:
        reason = str(fault).split("\n", 1)[0]
        raise BadValueError(
            f"{quote(text)} is not a requirement: {reason}", _requirement_hint(text)
        ) from None
    if found.url and found.url.startswith("file:"):
        raise BadValueError(
            f"{quote(text)} names a file of one machine", "write a path relative to the spec: `./libs/x`"
        )
    return text


def _not_a_requirement(text: str) -> str | None:
    """Return what to write instead of things that pip's command line takes and a requirement is not."""
    word = text.split(maxsplit=1)[-1] if text.strip() else ""
    if text.startswith(("-e", "--editable")):
        return f"leave `{text.split(maxsplit=1)[0]}` out: write `{word}`"
    if text.startswith(("-r", "--requirement")):
        return f"use the key `requirements: {word}`"
    if text.startswith("-"):
        return "options belong into the host's pip configuration, which is honoured"
    if text.startswith(("/", "~")):
        return "write a path relative to the spec: `./libs/mypkg`"
    if re.match(r"[a-z+]+://", text):
        return f"name it: `NAME @ {text}`"
    return None


def _requirement_hint(text: str) -> str:
    match = re.fullmatch(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*[= ]\s*v?([0-9][A-Za-z0-9.*+!]*)\s*", text)
    if match:
        return f'write `"{match[1]}=={match[2]}"`'
    words = text.replace(",", " ").split()
    if len(words) > 1 and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", word) for word in words):
        return "write one entry for each: " + f"`[{', '.join(words)}]`"
    return 'write it as for pip: `numpy`, `"numpy>=1.26,<2"`, `"torchvision[extra]==0.8.2"`'


def apt(text: str) -> str:
    """Return a Debian package's name, with `=VERSION` at will. Source: Debian Policy 5.6.7, 5.6.12."""
    if _APT.fullmatch(text):
        return text
    words = text.replace(",", " ").split()
    if len(words) > 1:
        hint = f"write one entry for each: `[{', '.join(words)}]`"
    elif _APT.fullmatch(text.lower()):
        hint = f"write `{text.lower()}`"
    else:
        hint = "write `git`, or with a version `git=1:2.39.5-0+deb12u1`"
    raise BadValueError(f"{quote(text)} is not the name of a Debian package", hint)


def base(text: str) -> str:
    """Return a base's name as `debian:NUMBER`; Debian's code names mean the same."""
    system, _, release = text.partition(":")
    numbers = {**{number: number for number in DEBIAN}, **{word: number for number, word in DEBIAN.items()}}
    if system == "debian" and release in numbers:
        return f"debian:{numbers[release]}"
    names = [f"debian:{release}" for release in numbers]
    hint = did_you_mean(text, names) or "write one of " + ", ".join(f"`debian:{number}`" for number in DEBIAN)
    raise BadValueError(f"{quote(text)} is not a base", hint)


def mirror(text: str) -> str:
    """Return a Debian mirror's URL."""
    match = _MIRROR.fullmatch(text)
    if match is None:
        raise BadValueError(f"{quote(text)} is not a mirror's URL", "write `https://HOST/debian`")
    if match["credentials"]:
        hint = "keep them in apt's `auth.conf`, which is honoured"
        raise BadValueError("a spec must not hold credentials", hint)
    return text


def image(text: str) -> str:
    """Return an image reference."""
    if _REFERENCE.fullmatch(text):
        return text
    hint = f"write `{text.lower()}`" if _REFERENCE.fullmatch(text.lower()) else "write `HOST/NAME:TAG`"
    raise BadValueError(f"{quote(text)} is not an image reference", hint)


def variable(text: str) -> str:
    """Return the name of an environment variable. Source: POSIX.1-2017, XBD 8.1."""
    if _VARIABLE.fullmatch(text):
        return text
    raise BadValueError(
        f"{quote(text)} cannot be a variable's name", "use letters, digits and `_`, no digit first"
    )


def network(text: str) -> str:
    """Return how a container is connected."""
    return one_of(text, NETWORKS)


def relative_file(text: str) -> str:
    """Return a path relative to the spec."""
    if not text.strip() or text.startswith(("/", "~")):
        raise BadValueError(
            f"{quote(text)} is not relative to the spec", "write a path such as `requirements.txt`"
        )
    return text


def mount_source(text: str) -> str:
    """Return a mount's host side: absolute, relative to the spec, or below `~`."""
    if not text or not text.isprintable():
        raise BadValueError(f"{quote(text)} is not a directory's path", "write a path such as `./data`")
    return text


def mount_target(text: str) -> str:
    """Return a mount's place in the container: absolute, in plain form, none the container needs itself."""
    plain = "/" + "/".join(part for part in text.split("/") if part not in ("", "."))
    if not text.startswith("/"):
        raise BadValueError(f"{quote(text)} is not an absolute path", f"write `{plain}`")
    if ".." in text.split("/") or not text.isprintable():
        raise BadValueError(f"{quote(text)} is not a plain path", "write it without `..`")
    if plain == "/" or plain.split("/")[1] in ("proc", "sys") or plain == "/dev":
        raise BadValueError(
            f"{quote(text)} cannot be covered by a mount", "choose a directory such as `/data`"
        )
    return plain


def mount(text: str) -> dict[str, str]:
    """Return the keys of a mount from `SOURCE:TARGET[:ro|rw]`. Source: docker-run(1), `--volume`."""
    match = _MOUNT.fullmatch(text)
    if match is None:
        raise BadValueError(f"{quote(text)} is not SOURCE:TARGET[:ro]", 'write `"./data:/data"`')
    readonly = "true" if match["mode"] == "ro" else "false"
    return {"source": match["source"], "target": match["target"], "readonly": readonly}


def command(text: str) -> str:
    """Return a shell command."""
    if not text.strip():
        raise BadValueError("an empty command", "remove it")
    return text
