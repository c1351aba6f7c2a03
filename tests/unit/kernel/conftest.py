"""A home whose socket directory lies in it: pytest's own paths are too long for Unix sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlenv-") as home:
        monkeypatch.setenv("MLENV_HOME", home)
        yield Path(home)
