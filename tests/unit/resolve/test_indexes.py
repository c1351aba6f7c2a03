from __future__ import annotations

import os

import pytest

from mlenv.resolve import indexes


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Give the home directory of a user on a machine without any settings of its own."""
    monkeypatch.setattr(indexes, "_ETC", tmp_path / "etc")
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    (tmp_path / ".config" / "uv").mkdir(parents=True)
    return tmp_path


def environ(home, **more):
    return {"HOME": str(home), "PATH": os.defpath, "XDG_CONFIG_DIRS": str(home / "etc"), **more}


def write_pip(home, text):
    (home / ".config" / "pip" / "pip.conf").write_text(text)


def write_uv(home, text):
    (home / ".config" / "uv" / "uv.toml").write_text(text)


def test_pips_indexes_become_uvs_with_pips_meaning(home):
    write_pip(
        home,
        "[global]\nindex-url = https://a.example/simple\n"
        "extra-index-url = https://b.example/simple\n    file:///srv/simple\n"
        "[install]\nfind_links = /srv/wheels https://c.example/wheels\n",
    )
    variables = indexes.host_indexes(environ(home)).environment
    assert variables["UV_DEFAULT_INDEX"] == "https://a.example/simple"
    assert variables["UV_EXTRA_INDEX_URL"] == "https://b.example/simple file:///srv/simple"
    assert variables["UV_FIND_LINKS"] == "/srv/wheels,https://c.example/wheels"
    assert variables["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_variables_win_over_files_and_a_commands_section_over_the_global_one(home):
    write_pip(
        home,
        "[global]\nindex-url = https://a.example\ntimeout = 7\n[install]\nindex-url = https://b.example\n",
    )
    assert indexes.pip_settings(environ(home))["index-url"] == "https://b.example"
    named = home / "named.conf"
    named.write_text("[install]\nindex-url = https://c.example\n")
    assert indexes.pip_settings(environ(home, PIP_CONFIG_FILE=str(named)))["index-url"] == "https://c.example"
    assert (
        indexes.pip_settings(environ(home, PIP_INDEX_URL="https://d.example"))["index-url"]
        == "https://d.example"
    )
    assert indexes.pip_settings(environ(home, PIP_CONFIG_FILE=os.devnull)) == {}


def test_transport_settings_reach_uv(home):
    write_pip(
        home,
        "[global]\ncert = /ca.pem\nclient-cert = /me.pem\ntrusted-host = one.example two.example:8443\n"
        "proxy = http://proxy.example:3128\ntimeout = 60\nno-index = true\n",
    )
    found = indexes.host_indexes(environ(home))
    assert {
        key: found.environment[key] for key in sorted(found.environment) if key.startswith(("SSL", "ALL"))
    } == {
        "ALL_PROXY": "http://proxy.example:3128",
        "SSL_CERT_FILE": "/ca.pem",
        "SSL_CLIENT_CERT": "/me.pem",
    }
    assert found.environment["UV_INSECURE_HOST"] == "one.example two.example:8443"
    assert found.environment["UV_HTTP_TIMEOUT"] == "60"
    assert found.arguments == ("--no-index",)


def test_other_tools_ca_bundle_is_taken_where_uv_has_none(home):
    found = indexes.host_indexes(environ(home, REQUESTS_CA_BUNDLE="/corp.pem")).environment
    assert found["SSL_CERT_FILE"] == "/corp.pem"
    both = indexes.host_indexes(
        environ(home, REQUESTS_CA_BUNDLE="/corp.pem", SSL_CERT_FILE="/uv.pem")
    ).environment
    assert both["SSL_CERT_FILE"] == "/uv.pem"


@pytest.mark.parametrize("own", ["variable", "file", "pip table", "index table"])
def test_uvs_own_indexes_win_over_pips(home, own):
    write_pip(home, "[global]\nindex-url = https://pip.example\nextra-index-url = https://more.example\n")
    more = {"UV_DEFAULT_INDEX": "https://uv.example"} if own == "variable" else {}
    write_uv(
        home,
        {
            "variable": "",
            "file": 'index-url = "https://uv.example"\n',
            "pip table": '[pip]\nindex-url = "https://uv.example"\n',
            "index table": '[[index]]\nurl = "https://uv.example"\ndefault = true\n',
        }[own],
    )
    found = indexes.host_indexes(environ(home, **more)).environment
    assert found.get("UV_DEFAULT_INDEX") == more.get("UV_DEFAULT_INDEX")
    assert "UV_EXTRA_INDEX_URL" not in found
    assert "UV_INDEX_STRATEGY" not in found


def test_what_lies_around_the_caller_does_not_reach_uv(home):
    around = {
        "VIRTUAL_ENV": "/v",
        "CONDA_PREFIX": "/c",
        "UV_PYTHON": "3.12",
        "UV_PROJECT": "/p",
        "PYTHONPATH": "/x",
    }
    found = indexes.host_indexes(environ(home, **around)).environment
    assert not around.keys() & found.keys()
    assert found["HOME"] == str(home)


def test_credentials_are_hidden_in_text_and_given_back_to_their_server_only(home):
    text = "Failed to fetch: https://me:s3cret@pkg.example/simple/x and http://token@other.example/"
    assert (
        indexes.redacted(text)
        == "Failed to fetch: https://***@pkg.example/simple/x and http://***@other.example/"
    )
    found = indexes.host_indexes(environ(home, PIP_INDEX_URL="https://me:s3%2Fcret@pkg.example/simple"))
    assert (
        indexes.with_credentials("https://pkg.example/f.whl", found)
        == "https://me:s3%2Fcret@pkg.example/f.whl"
    )
    assert indexes.with_credentials("https://else.example/f.whl", found) == "https://else.example/f.whl"
    assert indexes.with_credentials("http://pkg.example/f.whl", found) == "http://pkg.example/f.whl"
