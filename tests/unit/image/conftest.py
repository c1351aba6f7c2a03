"""A store, a home of its own and a base of three packages."""

from __future__ import annotations

import pytest
from image_makers import write_deb

from mlenv.image.store import Store


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    made.prepare()
    return made


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "home"))


@pytest.fixture
def base_debs(tmp_path):
    debs = tmp_path / "debs"
    debs.mkdir()
    return [
        write_deb(debs, "base-files", essential=True, depends="libc6", files={"etc/debian_version": b"12\n"}),
        write_deb(debs, "libc6", files={"lib/libc.so": b"\x7fELF"}),
        write_deb(debs, "python3", files={"usr/lib/python3.11/os.py": b"name = 'posix'\n"}),
    ]
