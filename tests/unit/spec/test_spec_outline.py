"""The data and the digest of a spec without reading its YAML twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlenv import paths
from mlenv.errors import InvalidSpecError, SpecNotFoundError
from mlenv.spec import reader
from mlenv.spec.reader import read_document, read_outline

TEXT = "name: x\npython: '3.11'\npackages: [numpy, é]\nenv: {A: '1'}\n"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "home"))
    path = tmp_path / "x.yaml"
    path.write_text(TEXT, "utf-8")
    return path


def agrees(path: Path) -> bool:
    outline, document = read_outline(path), read_document(path)
    return (outline.path, outline.data, outline.digest) == (path, document.data, document.digest)


def test_an_outline_is_what_the_document_says_first_and_again(spec: Path) -> None:
    assert agrees(spec)
    assert agrees(spec)


def test_the_yaml_is_read_once(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_outline(spec)
    monkeypatch.setattr(reader, "read_document", lambda _: pytest.fail("the YAML was read again"))
    assert read_outline(spec) == first


def test_an_edited_text_is_read(spec: Path) -> None:
    before = read_outline(spec)
    spec.write_text(TEXT.replace("numpy", "scipy"), "utf-8")
    assert agrees(spec)
    assert read_outline(spec).digest != before.digest


def test_a_changed_requirement_changes_the_digest_of_the_same_text(spec: Path) -> None:
    spec.write_text("name: x\nrequirements: r.txt\n", "utf-8")
    (spec.parent / "r.txt").write_text("numpy\n", "utf-8")
    before = read_outline(spec)
    (spec.parent / "r.txt").write_text("scipy\n", "utf-8")
    assert agrees(spec)
    assert read_outline(spec).digest != before.digest


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_damaged_cache_is_no_obstacle(spec: Path, content: bytes) -> None:
    read_outline(spec)
    (kept,) = paths.cache_dir().rglob("*.json")
    kept.write_bytes(content)
    assert agrees(spec)


def test_a_cache_that_cannot_be_written_is_no_obstacle(spec: Path) -> None:
    paths.cache_dir().parent.mkdir()
    paths.cache_dir().write_text("a file")
    assert agrees(spec)


def test_a_fault_is_reported_every_time(spec: Path) -> None:
    spec.write_text("name: [x\n", "utf-8")
    for _ in range(2):
        with pytest.raises(InvalidSpecError, match=r"x\.yaml:"):
            read_outline(spec)
    spec.unlink()
    with pytest.raises(SpecNotFoundError):
        read_outline(spec)


def test_what_was_read_before_needs_no_yaml(spec: Path) -> None:
    read_outline(spec)
    script = "import sys; from pathlib import Path; from mlenv.spec.reader import read_outline; "
    script += "read_outline(Path(sys.argv[1])); print({'yaml', 'pydantic'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(spec)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
