"""The directory of one kernel: what is in it, who may read it, and that none is left."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from mlenv import paths
from mlenv.kernel.connection import CHANNELS, new_connection

SIGNING = {"key": "secret", "signature_scheme": "hmac-sha256"}
ID = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def home(short_home):
    return short_home


def test_sockets_are_named_as_libzmq_names_them():
    connection = new_connection(ID, SIGNING)
    document = connection.document
    for channel in CHANNELS:
        assert str(connection.socket(channel)) == f"{document['ip']}-{document[f'{channel}_port']}"
    assert len({document[f"{channel}_port"] for channel in CHANNELS}) == 5
    assert (document["transport"], document["key"]) == ("ipc", "secret")
    connection.remove()


def test_socket_paths_fit_even_below_a_long_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / ("x" * 100)))
    connection = new_connection(ID, SIGNING)
    assert max(len(os.fsencode(connection.socket(channel))) for channel in CHANNELS) <= paths.SOCKET_PATH_MAX
    connection.remove()


def test_only_the_owner_can_read_the_key():
    connection = new_connection(ID, SIGNING)
    connection.prepare()
    assert stat.S_IMODE(connection.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(connection.file.stat().st_mode) == 0o600
    assert json.loads(connection.file.read_text()) == connection.document
    connection.remove()


def test_a_front_end_that_died_is_swept_and_one_that_lives_is_not():
    mine = new_connection(ID, SIGNING)
    script = f"from mlenv.kernel.connection import new_connection; new_connection({ID!r}, {{}}).prepare()"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert len(list(mine.directory.parent.iterdir())) == 2
    next_one = new_connection(ID, SIGNING)
    assert sorted(mine.directory.parent.iterdir()) == sorted([mine.directory, next_one.directory])
    mine.remove()
    next_one.remove()
    assert list(mine.directory.parent.iterdir()) == []


class TestHostileContainer:
    """The container can write to the directory too: what it plants there reaches nothing of the host's."""

    @pytest.fixture
    def victim(self, tmp_path):
        path = tmp_path / "victim"
        path.write_text("mine")
        return path

    def test_a_link_for_the_connection_file_is_replaced_and_not_followed(self, victim):
        connection = new_connection(ID, SIGNING)
        connection.file.symlink_to(victim)
        connection.prepare()
        assert victim.read_text() == "mine"
        assert not connection.file.is_symlink()
        assert json.loads(connection.file.read_text()) == connection.document
        connection.remove()

    def test_a_link_for_the_directory_is_refused(self, victim):
        connection = new_connection(ID, SIGNING)
        connection.directory.rmdir()
        connection.directory.symlink_to(victim.parent)
        with pytest.raises(NotADirectoryError):
            connection.prepare()
        connection.remove()
        assert list(victim.parent.glob("connection.json")) == []
        assert victim.read_text() == "mine"

    def test_strays_are_swept_and_hinder_no_later_kernel(self, victim):
        first = new_connection(ID, SIGNING)
        (first.directory.parent / "stray").write_text("x")
        (first.directory.parent / "link").symlink_to(victim.parent)
        second = new_connection(ID, SIGNING)
        assert sorted(first.directory.parent.iterdir()) == sorted([first.directory, second.directory])
        assert victim.read_text() == "mine"
        first.remove()
        second.remove()
