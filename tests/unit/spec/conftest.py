"""Specs written to a file and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlenv.errors import InvalidSpecError
from mlenv.spec.model import Spec
from mlenv.spec.reader import read_spec

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a text to `x.yaml` in the current directory."""
    monkeypatch.chdir(tmp_path)

    def put(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_bytes(text.encode())
        return path

    return put


@pytest.fixture
def read(write: Write) -> Callable[[str], Spec]:
    """Read a text as a spec."""
    return lambda text: read_spec(write(text))


@pytest.fixture
def faults(write: Write) -> Callable[[str], list[str]]:
    """Return the faults of a text as `line:column: message = hint` lines; a text without any fails."""

    def collect(text: str) -> list[str]:
        with pytest.raises(InvalidSpecError) as caught:
            read_spec(write(text))
        found: list[str] = []
        for line in caught.value.message.splitlines()[1:]:
            if line.startswith("x.yaml:"):
                found.append(line.removeprefix("x.yaml:"))
            elif "= hint: " in line:
                found[-1] += " = " + line.split("= hint: ", 1)[1]
        return found

    return collect
