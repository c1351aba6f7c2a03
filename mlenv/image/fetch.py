"""Downloads: in parallel, resumed where they broke off, and believed only when their sha256 is right.

What is on its way is `SHA256.part` in the cache, held by a flock while a process writes it; a finished
download keeps the bare sha256 as its name until it has been unpacked. Local files are checked and used where
they are.

Source: RFC 9110, 14 (range requests), 10.2.3 (Retry-After).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import socket
import subprocess
import threading
import urllib.parse
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol
from urllib.request import getproxies, proxy_bypass, url2pathname

from mlenv.errors import DownloadError
from mlenv.image.digest import sha256_of_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import urllib3

    from mlenv.lock.model import DebPackage, PythonLock, Wheel
    from mlenv.progress import Step

CONNECTIONS = 8
ATTEMPTS = 5
CONNECT_TIMEOUT = 20.0
"""Seconds until a server must have accepted a connection."""
STALL_TIMEOUT = 60.0
"""Seconds a server may stay silent in the middle of a download."""
RETRY_WAIT_MAX = 30.0
"""Longest wait before another attempt, in seconds, whatever a server asks for."""

_CHUNK = 1 << 18
_STOP_LATENCY = 0.2
"""Seconds until downloads that were told to stop begin to."""
_OK, _PARTIAL, _RANGE_NOT_SATISFIABLE = 200, 206, 416
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class Sources(Protocol):
    """Where this machine finds what a lock names; a lock itself holds no URL."""

    def wheel_url(self, wheel: Wheel) -> str:
        """Return the URL (http, https or file) of a wheel."""

    def deb_url(self, package: DebPackage) -> str:
        """Return the URL of a Debian package on this machine's mirror."""

    def python_archive(self, python: PythonLock, directory: Path) -> Path:
        """Fetch a standalone CPython's archive into `directory`, checked, and return its path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """One file to fetch: `sha256` in hex, `size` in bytes where it is known; `proxy` "" means none."""

    url: str
    sha256: str
    name: str
    size: int | None = None
    proxy: str | None = None


def fetch_all(
    downloads: Sequence[Download], directory: Path, *, progress: Step, stopped: threading.Event | None = None
) -> Iterator[tuple[Download, Path]]:
    """Fetch files in parallel and yield each as soon as it is there, checked; `progress` counts bytes.

    A generator that is closed early, or `stopped`, ends the downloads under way; what they have got stays for
    the next time.

    Raises: DownloadError.
    """
    if not downloads:
        return
    directory.mkdir(parents=True, exist_ok=True)
    session = _Session(directory, progress, stopped or threading.Event())
    # Large files first, so that none of them is left for the end.
    ordered = sorted(downloads, key=lambda each: -(each.size or 0))
    executor = ThreadPoolExecutor(min(CONNECTIONS, len(ordered)), thread_name_prefix="fetch")
    try:
        futures = {executor.submit(session.fetch, download): download for download in ordered}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=_STOP_LATENCY, return_when=FIRST_COMPLETED)
            if session.stopped.is_set():
                raise _stopped()
            for future in done:
                yield futures[future], future.result()
    finally:
        session.stop()
        executor.shutdown(wait=True, cancel_futures=True)


def forget(path: Path, directory: Path) -> None:
    """Delete a download that has been unpacked; a file that was used where it lay is left alone."""
    if path.parent == directory:
        path.unlink(missing_ok=True)


class _Session:
    """The connections of one batch of downloads."""

    def __init__(self, directory: Path, progress: Step, stopped: threading.Event) -> None:
        self._directory = directory
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._pools_lock = threading.Lock()
        self._responses: set[urllib3.BaseHTTPResponse] = set()
        self.stopped = stopped

    def stop(self) -> None:
        """End what is under way; a server that is silent is not waited for."""
        self.stopped.set()
        with self._pools_lock:
            for response in self._responses:
                sock = getattr(response.connection, "sock", None)
                if sock is not None:
                    with suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    def fetch(self, download: Download) -> Path:
        """Return the checked file of a download."""
        parts = urllib.parse.urlsplit(download.url)
        if parts.scheme == "file":
            return self._local(download, Path(url2pathname(parts.path)))
        if parts.scheme not in {"http", "https"}:
            raise DownloadError(
                f"`{download.name}` cannot be fetched", cause=f"unknown scheme in `{_shown(download.url)}`"
            )
        return self._remote(download)

    def _local(self, download: Download, path: Path) -> Path:
        try:
            found = sha256_of_file(path)
        except OSError as error:
            raise DownloadError(f"`{download.name}` cannot be read", cause=str(error)) from error
        if found != download.sha256:
            raise _mismatch(download, found)
        self._advance(path.stat().st_size)
        return path

    def _remote(self, download: Download) -> Path:
        finished = self._directory / download.sha256
        part = self._directory / f"{download.sha256}.part"
        with _locked(part) as file:
            if finished.exists() and sha256_of_file(finished) == download.sha256:
                self._advance(finished.stat().st_size)
                part.unlink()
                return finished
            self._transfer(download, _Part(file, self._advance))
            part.replace(finished)
        return finished

    def _transfer(self, download: Download, part: _Part) -> None:
        """Fetch the rest of a file, with as many attempts as make progress or may.

        Raises: DownloadError.
        """
        import urllib3

        failures = 0
        while True:
            had = part.size
            try:
                self._attempt(download, part)
                return self._check(download, part)
            except (urllib3.exceptions.HTTPError, _TransientError, OSError) as error:
                if self.stopped.is_set():
                    raise _stopped() from error
                if (
                    isinstance(error, OSError)
                    and error.errno is not None
                    and not isinstance(error, ConnectionError)
                ):
                    raise
                failures = 1 if part.size > had else failures + 1
                if failures >= ATTEMPTS:
                    raise _unreachable(download, error) from error
                self._pause(failures, getattr(error, "retry_after", None))

    def _pause(self, failures: int, asked: float | None) -> None:
        wait = min(asked if asked is not None else 0.5 * 2 ** (failures - 1), RETRY_WAIT_MAX)
        if self.stopped.wait(wait):
            raise _stopped()

    def _attempt(self, download: Download, part: _Part) -> None:
        headers = _authorization(download.url)
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
        response = self._pool(download).request(
            "GET", _without_credentials(download.url), headers=headers, preload_content=False, redirect=True
        )
        with self._pools_lock:
            self._responses.add(response)
        try:
            self._receive(download, part, response)
        finally:
            with self._pools_lock:
                self._responses.discard(response)
            response.close()

    def _receive(self, download: Download, part: _Part, response: urllib3.BaseHTTPResponse) -> None:
        status = response.status
        if status == _RANGE_NOT_SATISFIABLE and part.size:
            # All of it is there already, or it is not what the server has; the check tells.
            if part.hexdigest() != download.sha256:
                part.restart()
                raise _TransientError("the server has another file than before")
            return
        if status in _TRANSIENT:
            raise _TransientError(
                f"the server answered {status} {response.reason}", _seconds(response.headers)
            )
        if status not in {_OK, _PARTIAL}:
            raise DownloadError(
                f"`{download.name}` cannot be fetched",
                cause=f"{_shown(download.url)} answered {status} {response.reason}",
                hint=_status_hint(status),
            )
        starts_here = response.headers.get("Content-Range", "").startswith(f"bytes {part.size}-")
        if part.size and not (status == _PARTIAL and starts_here):
            part.restart()
            if status == _PARTIAL:
                raise _TransientError("the server sent another range than it was asked for")
        for chunk in response.stream(_CHUNK, decode_content=False):
            if self.stopped.is_set():
                raise _stopped()
            part.append(chunk)
            if download.size is not None and part.size > download.size:
                raise _mismatch(download, f"more than {download.size} bytes")

    @staticmethod
    def _check(download: Download, part: _Part) -> None:
        part.flush()
        found = part.hexdigest()
        if found == download.sha256:
            return
        if download.size is not None and part.size < download.size:
            raise _TransientError(f"the connection ended after {part.size} of {download.size} bytes")
        part.restart()
        raise _mismatch(download, found)

    def _advance(self, amount: int) -> None:
        with self._progress_lock:
            self._progress.advance(amount)

    def _pool(self, download: Download) -> urllib3.PoolManager:
        proxy = _proxy(download)
        with self._pools_lock:
            if proxy not in self._pools:
                self._pools[proxy] = _new_pool(proxy)
            return self._pools[proxy]


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and appending that no other process writes meanwhile."""
    while True:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock before may have renamed or removed the file.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


class _Part:
    """A file under way: what it holds is hashed once when opened, then as it grows."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance
        self._sha256 = hashlib.sha256()
        self.size = 0
        file.seek(0)
        while chunk := file.read(_CHUNK):
            self._take(chunk)

    def _take(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        self.size += len(chunk)
        self._advance(len(chunk))

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._take(chunk)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()

    def restart(self) -> None:
        self._advance(-self.size)
        self._file.seek(0)
        self._file.truncate()
        self._sha256 = hashlib.sha256()
        self.size = 0


class _TransientError(Exception):
    """Worth another attempt; `retry_after` in seconds, where the server named it."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def _seconds(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _status_hint(status: int) -> str:
    if status in {401, 403}:
        return "set up credentials for this server in ~/.netrc or in the index's URL"
    return "resolve anew: the file may have been removed from the server"


def _stopped() -> DownloadError:
    return DownloadError("the download was stopped", hint="run the command again: it resumes")


def _mismatch(download: Download, found: str) -> DownloadError:
    return DownloadError(
        f"`{download.name}` is not the file that was locked",
        cause=f"{_shown(download.url)} has {found}, the lock says sha256 {download.sha256}",
        hint="resolve anew if the change is meant; otherwise do not trust this server",
        code="digest-mismatch",
    )


def _unreachable(download: Download, error: Exception) -> DownloadError:
    return DownloadError(
        f"`{download.name}` could not be fetched in {ATTEMPTS} attempts",
        cause=f"{_shown(download.url)}: {error}",
        hint="check the network and the proxy settings, then run the command again: it resumes",
    )


# --- the host's network settings


def _new_pool(proxy: str | None) -> urllib3.PoolManager:
    import urllib3

    options: dict[str, Any] = {
        "ssl_context": _tls_context(),
        "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT, read=STALL_TIMEOUT),
        "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=8),
        "maxsize": CONNECTIONS,
    }
    if proxy is None:
        return urllib3.PoolManager(**options)
    credentials = urllib.parse.urlsplit(proxy)
    if credentials.username is not None:
        password = urllib.parse.unquote(credentials.password or "")
        login = f"{urllib.parse.unquote(credentials.username)}:{password}"
        options["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=login)
    return urllib3.ProxyManager(_without_credentials(proxy), **options)


def _tls_context() -> object:
    """Return a TLS context that trusts what the host trusts, and the bundle named to its pip or curl."""
    import ssl

    context = ssl.create_default_context()
    for variable in _CA_VARIABLES:
        bundle = os.environ.get(variable)
        if bundle and Path(bundle).is_file():
            context.load_verify_locations(cafile=bundle)
            break
    return context


def _proxy(download: Download) -> str | None:
    """Return the proxy for a URL: the download's own, else the one the environment names."""
    parts = urllib.parse.urlsplit(download.url)
    if download.proxy is not None:
        return download.proxy or None
    if proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        return f"http://{proxy}"
    return proxy


def _authorization(url: str) -> dict[str, str]:
    """Return the header that logs in with the URL's own credentials, else with those of ~/.netrc."""
    import urllib3

    parts = urllib.parse.urlsplit(url)
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    else:
        found = _netrc(parts.hostname or "")
        if found is None:
            return {}
        login = ":".join(found)
    return dict(urllib3.make_headers(basic_auth=login))


def _netrc(host: str) -> tuple[str, str] | None:
    import netrc

    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return None
    except (netrc.NetrcParseError, OSError) as error:
        raise DownloadError(
            f"`{path}` cannot be read", cause=str(error), hint="correct it or unset NETRC"
        ) from error
    return (found[0], found[2] or "") if found else None


def _without_credentials(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _shown(url: str) -> str:
    """Return a URL as messages may show it, without its credentials and query."""
    return _without_credentials(urllib.parse.urlsplit(url)._replace(query="", fragment="").geturl())


def apt_proxy(url: str) -> str | None:
    """Return the proxy that apt uses for a URL: "" for none at all, None where apt does not say.

    Source: apt-transport-http(1), Acquire::http::Proxy.
    """
    parts = urllib.parse.urlsplit(url)
    options = _apt_options()
    for key in (f"Acquire::{parts.scheme}::Proxy::{parts.hostname}", f"Acquire::{parts.scheme}::Proxy"):
        if options.get(key):
            return "" if options[key] == "DIRECT" else options[key]
    return None


@functools.cache
def _apt_options() -> dict[str, str]:
    if not shutil.which("apt-config"):
        return {}
    found = subprocess.run(
        ["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True
    ).stdout
    lines = (line.removesuffix(";").partition(" ") for line in found.splitlines())
    return {key: value.strip('"') for key, _, value in lines}
