"""Downloads against a real server on the loopback: broken off, wrong, refused, behind a proxy."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlenv.errors import DownloadError
from mlenv.image import fetch
from mlenv.image.fetch import Download, apt_proxy, fetch_all
from mlenv.progress import SilentStep

CONTENT = os.urandom(1_500_000)
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Counter(SilentStep):
    def __init__(self):
        self.amount = 0

    def advance(self, amount=1):
        self.amount += amount


@contextmanager
def server(answer):
    """Serve requests with `answer(handler)`; the server's `requests` are (path, Range, headers)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.server.requests.append(
                (
                    self.path,
                    self.headers.get("Range"),
                    {name.lower(): value for name, value in self.headers.items()},
                )
            )
            answer(self)

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests = []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield httpd
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def reply(handler, status, body=b"", **headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    if "Content_Length" not in headers:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def whole_or_range(handler):
    asked = handler.headers.get("Range")
    if asked is None:
        reply(handler, 200, CONTENT)
        return
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    reply(handler, 206, CONTENT[start:], Content_Range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fetch, "RETRY_WAIT_MAX", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def get(url, directory, *, sha256=SHA256, size=SIZE, progress=None, **options):
    download = Download(url=url, sha256=sha256, size=size, name="file.whl", **options)
    return next(fetch_all([download], directory, progress=progress or SilentStep()))[1]


def test_a_file_comes_whole(tmp_path):
    counter = Counter()
    with server(whole_or_range) as httpd:
        path = get(f"{httpd.url}/file", tmp_path, progress=counter)
    assert path.read_bytes() == CONTENT
    assert [each.name for each in tmp_path.iterdir()] == [SHA256]
    assert counter.amount == len(CONTENT)


def test_a_broken_connection_is_resumed_where_it_broke(tmp_path):
    def first_half_then_rest(handler):
        if len(handler.server.requests) == 1:
            reply(handler, 200, CONTENT[:700_000], Content_Length=str(len(CONTENT)))
            handler.close_connection = True
        else:
            whole_or_range(handler)

    counter = Counter()
    with server(first_half_then_rest) as httpd:
        path = get(f"{httpd.url}/file", tmp_path, progress=counter)
        asked = [each[1] for each in httpd.requests]
    assert path.read_bytes() == CONTENT
    assert asked[0] is None
    assert 0 < int(asked[1].removeprefix("bytes=").removesuffix("-")) <= 700_000
    assert counter.amount == len(CONTENT)


def test_what_an_earlier_command_got_is_not_fetched_again(tmp_path):
    (tmp_path / f"{SHA256}.part").write_bytes(CONTENT[:1_000_000])
    with server(whole_or_range) as httpd:
        path = get(f"{httpd.url}/file", tmp_path)
        assert [each[1] for each in httpd.requests] == ["bytes=1000000-"]
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew(tmp_path):
    (tmp_path / f"{SHA256}.part").write_bytes(CONTENT[:1_000_000])
    counter = Counter()
    with server(lambda handler: reply(handler, 200, CONTENT)) as httpd:
        path = get(f"{httpd.url}/file", tmp_path, progress=counter)
    assert path.read_bytes() == CONTENT
    assert counter.amount == len(CONTENT)


def test_a_part_that_is_something_else_is_thrown_away(tmp_path):
    (tmp_path / f"{SHA256}.part").write_bytes(bytes(len(CONTENT)))

    def no_such_range(handler):
        if handler.headers.get("Range"):
            reply(handler, 416)
        else:
            reply(handler, 200, CONTENT)

    with server(no_such_range) as httpd:
        assert get(f"{httpd.url}/file", tmp_path).read_bytes() == CONTENT
        assert len(httpd.requests) == 2


def test_a_busy_server_is_asked_again(tmp_path):
    def busy_twice(handler):
        if len(handler.server.requests) < 3:
            reply(handler, 503, Retry_After="120")
        else:
            whole_or_range(handler)

    with server(busy_twice) as httpd:
        assert get(f"{httpd.url}/file", tmp_path).read_bytes() == CONTENT
        assert len(httpd.requests) == 3


def test_a_server_that_stays_busy_is_given_up(tmp_path):
    with server(lambda handler: reply(handler, 503)) as httpd:
        with pytest.raises(DownloadError, match="5 attempts") as caught:
            get(f"{httpd.url}/file", tmp_path)
        assert len(httpd.requests) == 5
    assert "503" in caught.value.cause


@pytest.mark.parametrize(("status", "said"), [(404, "resolve anew"), (403, "netrc"), (401, "netrc")])
def test_a_refusal_is_final_and_says_what_to_do(tmp_path, status, said):
    with server(lambda handler: reply(handler, status)) as httpd:
        with pytest.raises(DownloadError) as caught:
            get(f"{httpd.url}/file?token=secret", tmp_path)
        assert len(httpd.requests) == 1
    assert said in caught.value.hint
    assert str(status) in caught.value.cause
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("body", [CONTENT[:-1] + b"x", CONTENT + b"more"])
def test_another_file_than_the_locked_one_is_refused(tmp_path, body):
    with server(lambda handler: reply(handler, 200, body)) as httpd:
        with pytest.raises(DownloadError) as caught:
            get(f"{httpd.url}/file", tmp_path)
        assert len(httpd.requests) == 1
    assert caught.value.code == "digest-mismatch"
    assert not (tmp_path / SHA256).exists()


def test_no_server_at_all_is_said_so(tmp_path):
    with server(whole_or_range) as httpd:
        url = httpd.url
    with pytest.raises(DownloadError, match="attempts"):
        get(f"{url}/file", tmp_path)


def test_many_files_come_in_parallel_and_each_once(tmp_path):
    contents = {
        hashlib.sha256(str(number).encode()).hexdigest(): str(number).encode() for number in range(30)
    }
    with server(lambda handler: reply(handler, 200, contents[handler.path[1:]])) as httpd:
        downloads = [Download(url=f"{httpd.url}/{sha256}", sha256=sha256, name="x") for sha256 in contents]
        found = {
            download.sha256: path.read_bytes()
            for download, path in fetch_all(downloads, tmp_path, progress=SilentStep())
        }
        assert len(httpd.requests) == 30
    assert found == contents


def test_two_at_once_fetch_one_file_once(tmp_path):
    with server(whole_or_range) as httpd:
        paths = []
        threads = [
            threading.Thread(target=lambda: paths.append(get(f"{httpd.url}/f", tmp_path))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(httpd.requests) == 1
    assert [path.read_bytes() == CONTENT for path in paths] == [True] * 4


def test_a_local_file_is_used_where_it_lies(tmp_path):
    path = tmp_path / "a file.whl"
    path.write_bytes(CONTENT)
    assert get(path.as_uri(), tmp_path / "cache") == path
    fetch.forget(path, tmp_path / "cache")
    assert path.exists()
    with pytest.raises(DownloadError, match="locked"):
        get(path.as_uri(), tmp_path / "cache", sha256="0" * 64)
    with pytest.raises(DownloadError, match="cannot be read"):
        get((tmp_path / "missing").as_uri(), tmp_path / "cache")


def test_credentials_are_sent_and_never_shown(tmp_path):
    with server(lambda handler: reply(handler, 404)) as httpd:
        url = httpd.url.replace("//", "//user:se%40cret@")
        with pytest.raises(DownloadError) as caught:
            get(f"{url}/file", tmp_path)
        assert httpd.requests[0][2]["authorization"] == "Basic dXNlcjpzZUBjcmV0"
    assert "cret" not in str(caught.value)


def test_netrc_logs_in(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with server(whole_or_range) as httpd:
        get(f"{httpd.url}/file", tmp_path)
        assert httpd.requests[0][2]["authorization"] == "Basic dXNlcjpzZWNyZXQ="


@pytest.mark.parametrize("how", ["environment", "download"])
def test_a_proxy_is_used(tmp_path, monkeypatch, how):
    with server(whole_or_range) as httpd:
        if how == "environment":
            monkeypatch.setenv("http_proxy", httpd.url)
            get("http://packages.invalid/file", tmp_path)
        else:
            get("http://packages.invalid/file", tmp_path, proxy=httpd.url)
        assert httpd.requests[0][0] == "http://packages.invalid/file"


def test_no_proxy_is_obeyed(tmp_path, monkeypatch):
    with server(whole_or_range) as httpd:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert get(f"{httpd.url}/file", tmp_path).read_bytes() == CONTENT


def test_apts_proxy_is_found(monkeypatch):
    options = {
        "Acquire::http::Proxy": "http://cache.invalid:3142",
        "Acquire::http::Proxy::near.invalid": "DIRECT",
    }
    monkeypatch.setattr(fetch, "_apt_options", lambda: options)
    assert apt_proxy("http://far.invalid/x") == "http://cache.invalid:3142"
    assert apt_proxy("http://near.invalid/x") == ""
    assert apt_proxy("https://far.invalid/x") is None


def test_stopping_ends_the_downloads_and_keeps_what_came(tmp_path):
    go_on = threading.Event()

    def slow(handler):
        reply(handler, 200, CONTENT[:600_000], Content_Length=str(len(CONTENT)))
        go_on.wait(30)

    stopped = threading.Event()
    with server(slow) as httpd:
        download = Download(url=f"{httpd.url}/f", sha256=SHA256, size=len(CONTENT), name="f")
        counter = Counter()
        arriving = fetch_all([download], tmp_path, progress=counter, stopped=stopped)
        failures = []

        def run():
            try:
                next(arriving)
            except DownloadError as error:
                failures.append(error.message)

        thread = threading.Thread(target=run)
        thread.start()
        while counter.amount == 0:
            threading.Event().wait(0.01)
        stopped.set()
        thread.join(30)
        still_silent = not go_on.is_set()
        go_on.set()
    assert still_silent
    assert failures == ["the download was stopped"]
    assert (tmp_path / f"{SHA256}.part").stat().st_size > 0
