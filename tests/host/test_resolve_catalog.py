"""The whole resolution, with the package index, the Debian mirror and the apt of this machine."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest
from requires import requires

from mlenv import paths
from mlenv.errors import IndexUnreachableError, PackageNotFoundError, ResolveError
from mlenv.lock import canonical
from mlenv.progress import SilentProgress
from mlenv.resolve import debian
from mlenv.resolve.host import Host, facts
from mlenv.resolve.resolver import resolve
from mlenv.spec.reader import read_spec

ENVS = Path(__file__).parents[2] / "envs"
HOST = Host(architecture="amd64", glibc="2.36")


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory):
    """Give one `MLENV_HOME` to all tests here, so that package lists are fetched once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def warm_home(shared_home, monkeypatch):
    monkeypatch.setenv("MLENV_HOME", str(shared_home))


def bytes_of(path: Path) -> bytes:
    return canonical.dump(resolve(read_spec(path), host=HOST, progress=SilentProgress()).lock)


@requires("index", "mirror")
def test_the_same_spec_gives_the_same_bytes_with_and_without_a_cache():
    first = bytes_of(ENVS / "quickstart.yaml")
    assert bytes_of(ENVS / "quickstart.yaml") == first
    shutil.rmtree(paths.cache_dir())
    assert bytes_of(ENVS / "quickstart.yaml") == first


@requires("index", "mirror")
def test_every_choice_has_its_reason():
    resolution = resolve(read_spec(ENVS / "pytorch-1.7-cu102.yaml"), host=facts(), progress=SilentProgress())
    reasons = {reason.subject: reason for reason in resolution.reasons}
    assert set(reasons) == {"pytorch", "cuda", "cudnn", "python", "base", "pip", "numpy"}
    assert reasons["numpy"].choice.startswith("1.26")
    assert "`numpy<2`" in reasons["numpy"].because
    assert resolution.lock.pytorch.version == "1.7.1"


@requires("index", "mirror")
def test_the_course_build_is_chosen_and_its_index_named_where_it_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    spec = read_spec(ENVS / "pytorch-1.7-cu101.yaml")
    try:
        lock = resolve(spec, host=HOST, progress=SilentProgress()).lock
    except IndexUnreachableError as error:
        assert error.code == "pytorch-index-unreachable"  # noqa: PT017 - both outcomes are right
        assert "torch 1.7.1+cu101" in error.message  # noqa: PT017
    else:
        assert lock.python.source == "standalone"
        assert {wheel.name: wheel.version for wheel in lock.wheels}["torch"] == "1.7.1+cu101"


@requires("mirror")
@pytest.mark.parametrize("base", debian.BASES)
def test_a_base_is_pinned_to_packages_that_its_mirror_has(base):
    suite = debian.suite_of(base)
    with debian.solver(suite, architecture="amd64") as apt:
        packages = apt.base(suite)
        added = apt.additions(packages, ["git"])
    names = {package.name for package in packages}
    assert {"apt", "bash", "ca-certificates", "dpkg", "libc6", "procps", "python3"} <= names
    assert "usrmerge" not in names
    assert "git" in {package.name for package in added}
    assert not names & {package.name for package in added}
    roots = debian.mirrors(base)
    for package in (packages[0], added[0], next(row for row in packages if row.name == "libc6")):
        address = quote(debian.deb_url(package, roots), safe=":/+~")
        request = urllib.request.Request(address, method="HEAD")  # noqa: S310 - the host's own mirror
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
            assert int(answer.headers["Content-Length"]) == package.size


@requires("mirror")
def test_an_operating_system_package_that_is_not_there_is_answered_with_its_neighbours():
    suite = debian.suite_of("debian:12")
    with debian.solver(suite, architecture="amd64") as apt, pytest.raises(PackageNotFoundError) as caught:
        apt.additions(apt.base(suite), ["libgl1x"])
    assert "Debian bookworm has no package `libgl1x`" in caught.value.message
    assert "libgl1" in caught.value.hint


@requires("mirror")
def test_packages_that_exclude_each_other_are_named():
    suite = debian.suite_of("debian:12")
    with debian.solver(suite, architecture="amd64") as apt, pytest.raises(ResolveError) as caught:
        apt.additions(apt.base(suite), ["systemd-sysv", "sysvinit-core"])
    assert caught.value.code == "apt-conflict"
    assert "systemd-sysv : Conflicts: sysvinit-core" in caught.value.cause


def test_a_mirror_that_does_not_answer_is_named():
    suite = debian.suite_of("debian:12")
    dead = "http://127.0.0.1:9/debian http://127.0.0.1:9/debian-security"
    with (
        pytest.raises(IndexUnreachableError) as caught,
        debian.solver(suite, architecture="amd64", mirror=dead),
    ):
        pass
    assert caught.value.code == "mirror-unreachable"
    assert "`http://127.0.0.1:9/debian`" in caught.value.message
    assert "--mirror URL" in caught.value.hint


def test_without_apt_the_error_says_that_a_committed_lock_needs_none(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with (
        pytest.raises(ResolveError) as caught,
        debian.solver(debian.suite_of("debian:12"), architecture="amd64"),
    ):
        pass
    assert caught.value.code == "apt-missing"
    assert "lock" in caught.value.hint


@requires("index", "mirror")
def test_impossible_combinations_are_refused_before_anything_is_asked(tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    path.write_text('pytorch: "1.7"\ncuda: "10.1"\ncudnn: "7.1"\n')
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResolveError) as caught:
        resolve(read_spec(path), host=HOST, progress=SilentProgress())
    assert caught.value.hint == 'set `cudnn: "7.6"` in x.yaml:3, or leave the key out'
