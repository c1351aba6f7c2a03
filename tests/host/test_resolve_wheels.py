"""uv for real, against package indexes of our own on the loopback interface and in folders."""

from __future__ import annotations

import base64
import os
import ssl
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlenv.errors import IndexUnreachableError, PackageNotFoundError, ResolveError
from mlenv.lock.model import BaseLock, Lock, Platform, PythonLock, TorchLock
from mlenv.resolve import local, wheels
from mlenv.resolve.choice import Build
from mlenv.resolve.indexes import host_indexes
from mlenv.resolve.matrix import load
from mlenv.resolve.wheels import Target, Wanted, locate, resolve_wheels

TARGET = Target(python="3.9.2", architecture="amd64", glibc="2.31")
DEAD = "http://127.0.0.1:9"
"""An address where nothing listens: the discard port."""


# --- indexes of our own


def make_wheel(
    folder: Path, name: str, version: str, *, tag: str = "py3-none-any", requires: str = ""
) -> Path:
    """Write a wheel that holds one module and its metadata, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", f"version = {version!r}\n")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; asks for `secret` ("user:password") where there is one."""

    secret = ""

    def do_GET(self) -> None:
        wanted = "Basic " + base64.b64encode(self.secret.encode()).decode()
        if self.secret and self.headers.get("Authorization") != wanted:
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            super().do_GET()

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def send_head(self):
        found = super().send_head()
        if self.command == "HEAD" and found:
            found.close()
            return None
        return found

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve(tmp_path):
    """Give a function that serves a folder as a simple index and returns the address."""
    servers = []

    def start(folder: Path, *, secret: str = "", context: ssl.SSLContext | None = None) -> str:
        for package in [path for path in folder.iterdir() if path.is_dir()]:
            links = "".join(f'<a href="{file.name}">{file.name}</a>\n' for file in package.glob("*.whl"))
            (package / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
        handler = type("Secret", (Handler,), {"secret": secret})
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        host, port = server.server_address[:2]
        user = f"{secret}@" if secret else ""
        return f"{'https' if context else 'http'}://{user}{host}:{port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def bare_user(tmp_path, monkeypatch):
    """Be a user without any configuration, whose only index is the one a test names."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("mlenv.resolve.indexes._ETC", tmp_path / "etc")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / ".config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "mlenv"))


def resolve(*requirements: str, target: Target = TARGET, build: Build | None = None, **more: object):
    return resolve_wheels(Wanted(requirements=requirements, **more), target=target, build=build)


def lock_of(pinned, *, torch: TorchLock | None = None, python: str = "3.9.2") -> Lock:
    return Lock(
        name="x",
        spec="sha256:" + "0" * 64,
        platform=Platform(glibc="2.31"),
        base=BaseLock(name="debian:11", suite="bullseye", packages=()),
        python=PythonLock(version=python, source="debian:11", interpreter="/usr/bin/python3.9"),
        pytorch=torch,
        wheels=pinned,
    )


# --- which wheel


def test_one_wheel_per_package_for_the_target_with_size_and_digest(serve, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    make_wheel(folder / "one", "one", "1.0", requires="two")
    for tag in ("py3-none-any", "cp39-cp39-manylinux_2_17_x86_64", "cp39-cp39-manylinux_2_34_x86_64"):
        make_wheel(folder / "two", "two", "2.0", tag=tag)
    make_wheel(folder / "two", "two", "2.0", tag="cp311-cp311-manylinux_2_17_x86_64")
    monkeypatch.setenv("PIP_INDEX_URL", serve(folder))
    one, two = resolve("one")
    assert (one.name, one.version, one.filename) == ("one", "1.0", "one-1.0-py3-none-any.whl")
    assert two.filename == "two-2.0-cp39-cp39-manylinux_2_17_x86_64.whl"
    file = folder / "two" / two.filename
    assert two.size == file.stat().st_size
    assert two.sha256 == subprocess.check_output(["sha256sum", file], text=True).split()[0]


def test_the_best_version_of_all_indexes_and_folders_is_taken_as_pip_does(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "main" / "one", "one", "1.0")
    make_wheel(tmp_path / "extra" / "one", "one", "1.5")
    make_wheel(tmp_path / "folder", "one", "1.4")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "main"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "folder"))
    assert [wheel.version for wheel in resolve("one")] == ["1.4"]
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", serve(tmp_path / "extra"))
    assert [wheel.version for wheel in resolve("one")] == ["1.5"]
    assert [wheel.version for wheel in resolve("one<1.2")] == ["1.0"]


def test_a_folder_in_the_form_of_an_index_works(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "simple" / "one", "one", "1.0")
    serve(tmp_path / "simple")  # writes the pages
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    (wheel,) = resolve("one")
    assert wheel.size == (tmp_path / "simple" / "one" / wheel.filename).stat().st_size


def test_a_project_and_a_virtual_environment_around_the_caller_change_nothing(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index" / "one", "one", "1.0")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    project = tmp_path / "project"
    project.mkdir()
    (project / "uv.toml").write_text(f'index-url = "{DEAD}"\nexclude-newer = "2001-01-01"\n')
    (project / "pyproject.toml").write_text('[tool.uv.pip]\nresolution = "lowest"\n')
    monkeypatch.chdir(project)
    monkeypatch.setenv("VIRTUAL_ENV", str(project / "no-such-venv"))
    monkeypatch.setenv("UV_PYTHON", "3.42")
    assert [wheel.version for wheel in resolve("one")] == ["1.0"]


def test_a_requirements_file_is_read(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index" / "one", "one", "1.0")
    make_wheel(tmp_path / "index" / "two", "two", "2.0")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    file = tmp_path / "requirements.txt"
    file.write_text("# ours\ntwo>=1\n")
    assert [wheel.name for wheel in resolve("one", files=(file,))] == ["one", "two"]


# --- what goes wrong


def test_an_index_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", DEAD.replace("//", "//me:s3cret@"))
    with pytest.raises(IndexUnreachableError) as caught:
        resolve("one")
    assert caught.value.code == "index-unreachable"
    assert "Connection refused" in caught.value.cause
    assert "s3cret" not in str(caught.value)


def test_credentials_open_the_index_and_show_nowhere(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index" / "one", "one", "1.0")
    address = serve(tmp_path / "index", secret="me:s3cret")  # noqa: S106 - opens nothing
    monkeypatch.setenv("PIP_INDEX_URL", address)
    pinned = resolve("one")
    kept = [path.read_text(errors="replace") for path in (tmp_path / "mlenv").rglob("*") if path.is_file()]
    assert kept
    assert not any("s3cret" in text for text in (*kept, repr(pinned)))
    assert locate(lock_of(pinned)) == {pinned[0].sha256: f"{address}/one/{pinned[0].filename}"}
    with pytest.raises(PackageNotFoundError) as caught:
        resolve("no-such-package")
    assert "s3cret" not in str(caught.value)
    assert "no-such-package" in caught.value.message
    monkeypatch.setenv("PIP_INDEX_URL", address.replace("s3cret", "wr0ng"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "another-cache"))
    with pytest.raises(ResolveError) as refused:
        resolve("one")
    assert "wr0ng" not in str(refused.value)


def test_a_version_that_is_not_there_is_answered_with_its_neighbours(serve, tmp_path, monkeypatch):
    for version in ("1.0", "1.5", "3.0", "4.0"):
        make_wheel(tmp_path / "index" / "one", "one", version)
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    with pytest.raises(PackageNotFoundError) as caught:
        resolve("one==2.0")
    assert caught.value.message == "no package index of this host has `one==2.0`"
    assert caught.value.hint == "the nearest versions for this Python are 1.5, 3.0, 4.0"


def test_a_wheel_for_other_pythons_only(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index" / "one", "one", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    with pytest.raises(ResolveError) as caught:
        resolve("one")
    assert caught.value.code == "no-wheel"
    assert "cp311" in f"{caught.value.cause} {caught.value.hint}"


def test_packages_that_cannot_stand_together(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index" / "one", "one", "1.0", requires="two<2")
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path / "index" / "two", "two", version)
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    with pytest.raises(ResolveError) as caught:
        resolve("one", "two>=2")
    assert caught.value.code == "conflict"
    assert "depend on two<2" in caught.value.cause


def test_a_proxy_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://index.invalid/simple")
    monkeypatch.setenv("PIP_PROXY", DEAD)
    with pytest.raises(IndexUnreachableError):
        resolve("one")


def test_an_index_with_a_certificate_nobody_signed(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index" / "one", "one", "1.0")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index", context=context))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(IndexUnreachableError) as caught:
        resolve("one")
    assert caught.value.code == "index-tls"
    monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
    monkeypatch.setattr(wheels, "_size", lambda *_: 1)  # the size is asked with the standard library
    assert [wheel.version for wheel in resolve("one")] == ["1.0"]


def test_an_index_that_never_answers(tmp_path, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "1")
        with pytest.raises(IndexUnreachableError) as caught:
            resolve("one")
    assert caught.value.code == "index-timeout"


def test_without_uv_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ResolveError) as caught:
        resolve("one")
    assert (caught.value.code, caught.value.hint) == ("uv-missing", "/nowhere/python -m pip install uv")


# --- PyTorch builds


@pytest.fixture
def cu101():
    release = next(release for release in load().releases if release.version == "1.7.1")
    return Build(release=release, variant=release.variants["cu101"])


def test_a_build_in_the_hosts_find_links_is_taken_from_there(serve, tmp_path, monkeypatch, cu101):
    make_wheel(tmp_path / "index" / "torch", "torch", "1.7.1", tag="cp39-cp39-manylinux1_x86_64")
    make_wheel(tmp_path / "folder", "torch", "1.7.1+cu101", tag="cp39-cp39-linux_x86_64")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "folder"))
    requirements, constraints = wheels.torch_requirements(cu101)
    (wheel,) = resolve(*requirements, constraints=constraints, build=cu101)
    assert wheel.filename == "torch-1.7.1+cu101-cp39-cp39-linux_x86_64.whl"


def test_pypis_own_build_is_not_replaced_by_a_local_one(serve, tmp_path, monkeypatch, cu101):
    make_wheel(tmp_path / "index" / "torch", "torch", "1.7.1", tag="cp39-cp39-manylinux1_x86_64")
    make_wheel(tmp_path / "folder", "torch", "1.7.1+cpu", tag="cp39-cp39-linux_x86_64")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "folder"))
    default = Build(release=cu101.release, variant=cu101.release.variants["cu102"])
    requirements, constraints = wheels.torch_requirements(default)
    (wheel,) = resolve(*requirements, constraints=constraints, build=default)
    assert wheel.version == "1.7.1"


def test_a_build_that_only_the_pytorch_index_has_names_that_index_when_it_cannot_be_reached(
    serve, tmp_path, monkeypatch, cu101
):
    make_wheel(tmp_path / "index" / "torch", "torch", "1.7.1", tag="cp39-cp39-manylinux1_x86_64")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    monkeypatch.setenv("HTTPS_PROXY", DEAD)  # nothing beyond this machine answers
    requirements, constraints = wheels.torch_requirements(cu101)
    with pytest.raises(IndexUnreachableError) as caught:
        resolve(*requirements, constraints=constraints, build=cu101)
    assert caught.value.code == "pytorch-index-unreachable"
    assert caught.value.message.startswith("the PyTorch wheel index cannot be reached: torch 1.7.1+cu101")
    assert "there is no version of torch==1.7.1+cu101" in caught.value.cause
    assert '`cuda: "10.2"`' in caught.value.hint


def test_a_missing_package_beside_such_a_build_is_the_error_and_not_the_index(
    serve, tmp_path, monkeypatch, cu101
):
    make_wheel(tmp_path / "index" / "torch", "torch", "1.7.1+cu101", tag="cp39-cp39-linux_x86_64")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    requirements, constraints = wheels.torch_requirements(cu101)
    with pytest.raises(PackageNotFoundError, match="no-such-package"):
        resolve(*requirements, "no-such-package", constraints=constraints, build=cu101)


# --- local packages


def source(folder: Path, *, setup: str = "") -> Path:
    (folder / "mypkg").mkdir(parents=True)
    (folder / "mypkg" / "__init__.py").write_text("answer = 42\n")
    (folder / "setup.py").write_text(setup)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "mypkg"\nversion = "0.3"\ndependencies = ["one"]\n'
    )
    (folder / "backend.py").write_text(BACKEND)
    return folder


BACKEND = """\
import os, time, zipfile

TAG = os.environ.get("TEST_TAG", "py3-none-any")

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name = f"mypkg-0.3-{TAG}.whl"
    stamp = time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))[:6]
    texts = {
        "mypkg/__init__.py": open("mypkg/__init__.py").read(),
        "mypkg-0.3.dist-info/METADATA":
            "Metadata-Version: 2.1\\nName: mypkg\\nVersion: 0.3\\nRequires-Dist: one\\n",
        "mypkg-0.3.dist-info/WHEEL": f"Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: {TAG}\\n",
        "mypkg-0.3.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        for path, text in texts.items():
            archive.writestr(zipfile.ZipInfo(path, stamp), text)
    open("left-behind", "w").close()
    return name
"""


def test_a_local_package_becomes_a_wheel_with_its_path_and_the_same_bytes_every_time(
    serve, tmp_path, monkeypatch
):
    make_wheel(tmp_path / "index" / "one", "one", "1.0")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    folder = source(tmp_path / "spec" / "libs" / "mypkg")
    before = sorted(folder.rglob("*"))
    remote, packages = local.split(["one", "./libs/mypkg"], tmp_path / "spec")
    built = tuple(local.build(package, host_indexes()) for package in packages)
    pinned = resolve(*remote, local=built)
    assert [(wheel.name, wheel.path) for wheel in pinned] == [("mypkg", "./libs/mypkg"), ("one", None)]
    assert sorted(folder.rglob("*")) == before
    assert local.build(packages[0], host_indexes()).sha256 == built[0].sha256
    assert locate(lock_of(pinned))[pinned[0].sha256] == built[0].file.as_uri()
    built[0].file.unlink()
    assert locate(lock_of(pinned), directory=tmp_path / "spec")[pinned[0].sha256] == built[0].file.as_uri()
    built[0].file.unlink()
    (folder / "mypkg" / "__init__.py").write_text("answer = 43\n")
    with pytest.raises(ResolveError) as caught:
        locate(lock_of(pinned), directory=tmp_path / "spec")
    assert caught.value.code == "local-changed"


def test_a_local_package_with_compiled_code_is_refused(tmp_path, monkeypatch):
    source(tmp_path / "mypkg")
    monkeypatch.setenv("TEST_TAG", "cp311-cp311-linux_x86_64")
    _, packages = local.split(["./mypkg"], tmp_path)
    with pytest.raises(ResolveError) as caught:
        local.build(packages[0], host_indexes())
    assert caught.value.code == "local-not-pure"


def test_a_local_package_that_does_not_build_or_is_not_there(tmp_path):
    (source(tmp_path / "mypkg") / "backend.py").write_text("raise RuntimeError('broken on purpose')\n")
    _, packages = local.split(["./mypkg"], tmp_path)
    with pytest.raises(ResolveError) as caught:
        local.build(packages[0], host_indexes())
    assert caught.value.code == "local-build-failed"
    assert "broken on purpose" in caught.value.cause
    with pytest.raises(PackageNotFoundError, match=r"\./missing"):
        local.split(["./missing"], tmp_path)


# --- locating


def test_the_wheels_of_a_lock_are_found_again_without_the_cache(serve, tmp_path, monkeypatch):
    make_wheel(tmp_path / "index" / "one", "one", "1.0")
    address = serve(tmp_path / "index")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    pinned = resolve("one")
    expected = {pinned[0].sha256: f"{address}/one/{pinned[0].filename}"}
    assert locate(lock_of(pinned)) == expected
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "another-machine"))
    assert locate(lock_of(pinned)) == expected


def test_a_file_with_other_bytes_does_not_count(serve, tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index" / "one", "one", "1.0")
    monkeypatch.setenv("PIP_INDEX_URL", serve(tmp_path / "index"))
    pinned = resolve("one")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.py", "")
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "another-machine"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "another-cache"))
    with pytest.raises(ResolveError) as caught:
        locate(lock_of(pinned))
    assert caught.value.code == "wheel-not-found"
    assert pinned[0].sha256 in caught.value.cause
