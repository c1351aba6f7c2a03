"""The host's package indexes: pip's configuration translated for uv, whose own configuration wins.

pip reads global, user and site files, then the file PIP_CONFIG_FILE names, then PIP_* variables, later ones
over earlier ones. Source: pip documentation, "Configuration"; uv documentation, "Environment variables" and
"Indexes".
"""

from __future__ import annotations

import configparser
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]  # installed on 3.10 alone

_ETC = Path("/etc")
_SECTIONS = ("global", "install")
"""Sections of pip's files that apply to installing; the command's own wins."""

_SURROUNDINGS = (
    "CONDA_DEFAULT_ENV",
    "CONDA_PREFIX",
    "PYTHONHOME",
    "PYTHONPATH",
    "UV_ENV_FILE",
    "UV_MANAGED_PYTHON",
    "UV_NO_BINARY",
    "UV_NO_MANAGED_PYTHON",
    "UV_ONLY_BINARY",
    "UV_PROJECT",
    "UV_PROJECT_ENVIRONMENT",
    "UV_PYTHON",
    "UV_PYTHON_PREFERENCE",
    "UV_SYSTEM_PYTHON",
    "UV_TORCH_BACKEND",
    "UV_WORKING_DIR",
    "VIRTUAL_ENV",
)
"""Variables that tie uv to a project or interpreter near the caller; the target's are given instead."""

_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_PROXY_VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"`<>]+@")


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexes:
    """What uv is started with: its whole environment and further arguments; `urls` hold credentials."""

    environment: Mapping[str, str]
    arguments: tuple[str, ...]
    urls: tuple[str, ...]


def redacted(text: str) -> str:
    """Return `text` with the user and password of every address in it replaced."""
    return _CREDENTIALS.sub("***@", text)


def host_indexes(environ: Mapping[str, str] | None = None) -> Indexes:
    """Return the host's indexes as uv is told them. Nothing is asked over the network."""
    environ = os.environ if environ is None else environ
    pip = pip_settings(environ)
    own = uv_settings(environ)
    environment = {key: value for key, value in environ.items() if key not in _SURROUNDINGS}
    additions = _index_variables(pip, environ, own) | _transport_variables(pip, environ)
    environment |= {"NO_COLOR": "1", "UV_NO_PROGRESS": "1"} | additions
    no_index = _is_true(pip.get("no-index", "")) and not _indexes_of_uv(environ, own)
    return Indexes(
        environment=environment,
        arguments=("--no-index",) if no_index else (),
        urls=tuple(_addresses(environment, own)),
    )


# --- pip


def pip_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return pip's settings by their long option name; lists stay as text."""
    sections: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for path in _pip_files(environ):
        for section, found in _pip_file(path).items():
            sections[section] |= found
    settings = {key: value for section in _SECTIONS for key, value in sections[section].items()}
    for key, value in environ.items():
        if key.startswith("PIP_") and key != "PIP_CONFIG_FILE" and value:
            settings[key.removeprefix("PIP_").lower().replace("_", "-")] = value
    if "default-timeout" in settings:
        settings.setdefault("timeout", settings["default-timeout"])
    return settings


def _pip_files(environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield pip's configuration files, those that count most last."""
    named = environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return
    home = Path(environ.get("HOME") or Path.home())
    for folder in reversed((environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")):
        yield Path(folder) / "pip" / "pip.conf"
    yield _ETC / "pip.conf"
    yield home / ".pip" / "pip.conf"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    yield Path(sys.prefix) / "pip.conf"
    if named:
        yield Path(named)


def _pip_file(path: Path) -> dict[str, dict[str, str]]:
    """Return the sections of one of pip's files that apply here."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    return {
        section: {key.lower().replace("_", "-"): value for key, value in parser.items(section)}
        for section in _SECTIONS
        if parser.has_section(section)
    }


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")


# --- uv


def uv_settings(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of the system's and the user's uv.toml; the `pip` table's are the same settings."""
    settings: dict[str, Any] = {}
    if _is_true(environ.get("UV_NO_CONFIG", "")):
        return settings
    for path in _uv_files(environ):
        try:
            table = parse_toml(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        settings |= table | table.get("pip", {})
    return settings


def parse_toml(text: str) -> dict[str, Any]:
    """Return a TOML document as plain values."""
    document: dict[str, Any] = tomllib.loads(text)
    return document


def _uv_files(environ: Mapping[str, str]) -> Iterator[Path]:
    named = environ.get("UV_CONFIG_FILE")
    if named:
        yield Path(named)
        return
    home = Path(environ.get("HOME") or Path.home())
    yield _ETC / "uv" / "uv.toml"
    for folder in reversed((environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")):
        yield Path(folder) / "uv" / "uv.toml"
    yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "uv" / "uv.toml"


def _indexes_of_uv(environ: Mapping[str, str], own: Mapping[str, Any]) -> bool:
    variables = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
    return any(environ.get(name) for name in variables) or any(
        key in own for key in ("index", "index-url", "extra-index-url")
    )


def _index_variables(
    pip: Mapping[str, str], environ: Mapping[str, str], own: Mapping[str, Any]
) -> dict[str, str]:
    """Return pip's indexes as uv's variables, each left out where uv has such a setting of its own."""
    found: dict[str, str] = {}
    if not _indexes_of_uv(environ, own):
        if pip.get("index-url"):
            found["UV_DEFAULT_INDEX"] = pip["index-url"].strip()
        if pip.get("extra-index-url"):
            found["UV_EXTRA_INDEX_URL"] = " ".join(pip["extra-index-url"].split())
    if pip.get("find-links") and not environ.get("UV_FIND_LINKS") and "find-links" not in own:
        found["UV_FIND_LINKS"] = ",".join(_absolute(place) for place in pip["find-links"].split())
    chosen = environ.get("UV_INDEX_STRATEGY") or own.get("index-strategy")
    if ("UV_EXTRA_INDEX_URL" in found or "UV_FIND_LINKS" in found) and not chosen:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip takes the best version of all indexes
    return found


def _absolute(place: str) -> str:
    """Return a find-links place as an address or an absolute path: uv runs in another directory."""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))  # noqa: PTH100, PTH111 - text


def _transport_variables(pip: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return certificates, proxy and timeouts as uv's variables, each left out where uv's own is set."""
    bundle = pip.get("cert") or next((environ[name] for name in _CA_VARIABLES if environ.get(name)), None)
    wanted = {
        "SSL_CERT_FILE": bundle,
        "SSL_CLIENT_CERT": pip.get("client-cert"),
        "UV_INSECURE_HOST": " ".join(pip.get("trusted-host", "").split()),
        "UV_HTTP_TIMEOUT": pip.get("timeout"),
        "UV_HTTP_RETRIES": pip.get("retries"),
    }
    if pip.get("proxy") and not any(environ.get(name) for name in _PROXY_VARIABLES):
        wanted["ALL_PROXY"] = pip["proxy"]
    return {key: value for key, value in wanted.items() if value and not environ.get(key)}


# --- addresses


def _addresses(environment: Mapping[str, str], own: Mapping[str, Any]) -> Iterator[str]:
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL"):
        yield from (re.sub(r"^[\w.-]+=", "", word) for word in environment.get(name, "").split())
    yield from environment.get("UV_FIND_LINKS", "").split(",")
    yield from (row.get("url", "") for row in own.get("index", ()) if isinstance(row, dict))
    yield from (own.get("index-url", ""), *own.get("extra-index-url", ()), *own.get("find-links", ()))


def with_credentials(url: str, indexes: Indexes) -> str:
    """Return `url` with the credentials that the host's configuration has for its server, if any.

    uv takes them out of what it prints, and mlenv never stores them.
    """
    parts = urlsplit(url)
    for known in map(urlsplit, indexes.urls):
        if known.username is None or (known.scheme, _server(known.netloc)) != (
            parts.scheme,
            _server(parts.netloc),
        ):
            continue
        user = quote(unquote(known.username), safe="")
        password = f":{quote(unquote(known.password), safe='')}" if known.password else ""
        return urlunsplit(parts._replace(netloc=f"{user}{password}@{_server(parts.netloc)}"))
    return url


def _server(netloc: str) -> str:
    return netloc.rpartition("@")[2].lower()
