from __future__ import annotations

import pytest

from mlenv.errors import ResolveError
from mlenv.resolve import mirrors
from mlenv.resolve.mirrors import AptSource, deb822_sources, one_line_sources

DEB822 = """\
# the system's own
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main
Check-Valid-Until: no

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://vendor.example/apt
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEY
 -----END PGP PUBLIC KEY BLOCK-----
"""
ONE_LINE = """\
deb [arch=amd64 signed-by=/k.gpg trusted=yes] http://mirror.example/debian bullseye main # comment
deb-src http://mirror.example/debian bullseye main
# deb http://off.example/debian bullseye main
deb http://mirror.example/debian-security bullseye-security main
"""


@pytest.fixture
def sources(monkeypatch):
    """Give a function that makes this host's apt sources those of a text, and clears the variable."""
    monkeypatch.delenv(mirrors.VARIABLE, raising=False)

    def become(text, *, deb822=True):
        entries = list((deb822_sources if deb822 else one_line_sources)(text))
        monkeypatch.setattr(mirrors, "host_sources", lambda: iter(entries))

    return become


def test_deb822_sources_are_read_without_those_that_are_off():
    found = list(deb822_sources(DEB822))
    assert [source.uris for source in found] == [
        ("http://mirror.example/debian",),
        ("http://mirror.example/debian-security/",),
        ("https://vendor.example/apt",),
    ]
    assert found[0].options == {"Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg"}
    assert found[1].options == {"Check-Valid-Until": "no"}
    assert found[2].options["Signed-By"].endswith("\n -----END PGP PUBLIC KEY BLOCK-----")


def test_one_line_sources_keep_the_options_that_belong_to_a_mirror():
    found = list(one_line_sources(ONE_LINE))
    assert found[0] == AptSource(
        uris=("http://mirror.example/debian",),
        suites=("bullseye",),
        components=("main",),
        options={"Signed-By": "/k.gpg", "Trusted": "yes"},
    )
    assert len(found) == 2


@pytest.mark.parametrize(("text", "deb822"), [(DEB822, True), (ONE_LINE, False)])
def test_debians_archives_are_found_among_others_that_use_its_release_names(sources, text, deb822):
    sources(text, deb822=deb822)
    assert [(row.name, row.root) for row in mirrors.archives()] == [
        ("main", "http://mirror.example/debian"),
        ("security", "http://mirror.example/debian-security"),
    ]


def test_a_mirror_that_is_named_wins_and_keeps_the_hosts_security_archive(sources, monkeypatch):
    sources(DEB822)
    assert [row.root for row in mirrors.archives("http://mine.example/debian/")] == [
        "http://mine.example/debian",
        "http://mirror.example/debian-security",
    ]
    monkeypatch.setenv(mirrors.VARIABLE, "http://a.example/debian http://a.example/security")
    assert [row.root for row in mirrors.archives()] == [
        "http://a.example/debian",
        "http://a.example/security",
    ]
    assert [row.root for row in mirrors.archives("http://b.example/d http://b.example/s")] == [
        "http://b.example/d",
        "http://b.example/s",
    ]


def test_a_host_of_another_distribution_uses_debootstraps_own_default(sources, monkeypatch, tmp_path):
    sources(
        "Types: deb\nURIs: http://archive.example/ubuntu\nSuites: jammy jammy-updates\nComponents: main\n"
    )
    script = tmp_path / "debootstrap"
    script.write_text(
        '#!/bin/sh\nDEF_MIRROR="http://default.example/debian"\nDEF_HTTPS_MIRROR="https://x.example"\n'
    )
    monkeypatch.setattr(mirrors, "_DEBOOTSTRAP", (str(script),))
    assert [row.root for row in mirrors.archives()] == [
        "http://default.example/debian",
        "http://default.example/debian-security",
    ]
    script.unlink()
    with pytest.raises(ResolveError) as caught:
        mirrors.archives()
    assert caught.value.code == "no-mirror"
    assert "--mirror" in caught.value.hint


def test_a_mirror_list_is_replaced_by_its_best_entry(sources, tmp_path):
    listed = tmp_path / "mirrors.txt"
    listed.write_text(
        "# mine\nhttp://far.example/debian\tpriority:2\nhttp://near.example/debian/\tpriority:1\n"
    )
    sources(f"deb mirror+file:{listed} bookworm main\n", deb822=False)
    assert mirrors.archives()[0].root == "http://near.example/debian"
    listed.write_text("# nothing\n")
    with pytest.raises(ResolveError, match="is empty"):
        mirrors.archives()
