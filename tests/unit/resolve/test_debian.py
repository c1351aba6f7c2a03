from __future__ import annotations

import subprocess

import pytest

from mlenv.errors import IndexUnreachableError, PackageNotFoundError, ResolveError
from mlenv.lock.model import DebPackage
from mlenv.resolve import debian
from mlenv.resolve.mirrors import Archive

MAIN = Archive(name="main", root="http://mirror.example/debian", options={"Signed-By": "/k.gpg"})
SECURITY = Archive(name="security", root="http://mirror.example/debian-security")
SHA = "ab" * 32
PRINTED = f"""\
Reading package lists...
'{MAIN.root}/pool/main/n/nc/libnc6_6.2%2b2020-2_amd64.deb' libnc6_6.2+2020-2_amd64.deb 102316 SHA256:{SHA}
'{SECURITY.root}/pool/updates/main/p/pc/pc_3.3-5_amd64.deb' pc_2%3a3.3-5_amd64.deb 501856 SHA256:{SHA}
"""
UNREACHABLE = """\
W: Failed to fetch http://me:pw@mirror.example/debian/dists/bookworm/InRelease  Could not connect
W: Some index files failed to download. They have been ignored, or old ones used instead.
"""
NO_KEY = """\
W: GPG error: http://mirror.example/debian bookworm InRelease: The following signatures couldn't be verified \
because the public key is not available: NO_PUBKEY 0E98404D386FA1D9
E: The repository 'http://mirror.example/debian bookworm InRelease' is not signed.
"""
NO_SUITE = "E: The repository 'http://mirror.example/debian bookworm Release' does not have a Release file.\n"


@pytest.fixture
def apt(monkeypatch, tmp_path):
    """Give a solver whose apt answers what the test says; `calls` are the arguments it was given."""
    calls = []

    def answer(stdout="", stderr="", status=0):
        def run(command, *args, configuration):
            calls.append((command, *args))
            return subprocess.CompletedProcess(args, status, stdout, stderr)

        monkeypatch.setattr(debian, "_apt", run)
        return debian.Solver(
            configuration=tmp_path / "apt.conf", archives=(MAIN, SECURITY), codename="bookworm"
        )

    answer.calls = calls
    return answer


def test_what_apt_prints_becomes_pinned_packages(apt):
    packages = apt(PRINTED).install(["pc"])
    assert packages == (
        DebPackage(
            name="libnc6",
            version="6.2+2020-2",
            architecture="amd64",
            path="pool/main/n/nc/libnc6_6.2+2020-2_amd64.deb",
            archive="main",
            sha256=SHA,
            size=102316,
        ),
        DebPackage(
            name="pc",
            version="2:3.3-5",
            architecture="amd64",
            path="pool/updates/main/p/pc/pc_3.3-5_amd64.deb",
            archive="security",
            sha256=SHA,
            size=501856,
        ),
    )
    roots = {"main": MAIN.root, "security": SECURITY.root}
    assert debian.deb_url(packages[1], roots).startswith(
        "http://mirror.example/debian-security/pool/updates/"
    )


def test_the_same_question_over_the_same_lists_is_solved_once(apt, tmp_path):
    solver = apt(PRINTED)
    assert solver.install(["pc"]) == solver.install(["pc"])
    assert len(apt.calls) == 1
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mirror_InRelease").write_text("Date: today")
    solver.install(["pc"])
    assert len(apt.calls) == 2


def test_additions_hold_the_base_to_its_versions_and_leave_it_out(apt):
    solver = apt(PRINTED)
    base = solver.install(["libnc6"])[:1]
    assert [package.name for package in solver.additions(base, ["pc"])] == ["pc"]
    assert apt.calls[-1][-2:] == ("libnc6=6.2+2020-2", "pc")
    assert solver.additions(base, []) == ()


def test_an_unknown_package_is_named_with_its_neighbours(apt, monkeypatch):
    def run(command, *args, **_):
        names = "libgl1\nlibgl2ps1.4\nbash\n" if command == "apt-cache" else ""
        return subprocess.CompletedProcess(
            args, 0 if names else 100, names, "E: Unable to locate package libgl1x\n"
        )

    solver = apt()
    monkeypatch.setattr(debian, "_apt", run)
    with pytest.raises(PackageNotFoundError) as caught:
        solver.install(["libgl1x"])
    assert "no package `libgl1x`" in caught.value.message
    assert "libgl1" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "code", "kind"),
    [
        (UNREACHABLE, "mirror-unreachable", IndexUnreachableError),
        (NO_KEY, "mirror-signature", ResolveError),
        (NO_SUITE, "suite-not-on-mirror", IndexUnreachableError),
    ],
)
def test_a_failed_update_says_which_of_its_reasons_it_was(apt, tmp_path, said, code, kind):
    apt(stderr=said, status=100)
    with pytest.raises(kind) as caught:
        debian._update(tmp_path, debian.suite_of("debian:12"), (MAIN, SECURITY), tmp_path / "apt.conf")
    assert caught.value.code == code
    assert "mirror.example" in caught.value.cause
    assert "pw" not in str(caught.value)


def test_old_lists_never_stand_in_for_a_mirror_that_does_not_answer(apt, tmp_path):
    apt(stderr=UNREACHABLE, status=0)
    with pytest.raises(IndexUnreachableError):
        debian._update(tmp_path, debian.suite_of("debian:12"), (MAIN,), tmp_path / "apt.conf")


def test_sources_ask_for_the_suite_its_updates_and_security():
    text = debian._sources(debian.suite_of("debian:11"), (MAIN, SECURITY), "amd64", updates=True)
    assert "Suites: bullseye bullseye-updates\n" in text
    assert "Suites: bullseye-security\n" in text
    assert text.count("Signed-By: /k.gpg\n") == 1
    assert "bullseye-updates" not in debian._sources(
        debian.suite_of("debian:11"), (MAIN,), "amd64", updates=False
    )


def test_the_full_python_version_comes_from_its_package():
    packages = [
        DebPackage(
            name="python3.11-minimal", version="3.11.2-6+deb12u6", architecture="amd64",
            path="", archive="main", sha256=SHA, size=1,
        )
    ]  # fmt: skip
    assert debian.python_version(packages, "3.11") == "3.11.2"
    with pytest.raises(ResolveError, match=r"no Python 3\.9"):
        debian.python_version(packages, "3.9")
