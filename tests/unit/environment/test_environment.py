"""The main flow's own parts: whose lock is used, what is undone, and one command at a time."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from mlenv import environment
from mlenv.errors import MlenvError
from mlenv.lock.file import read_lock, write_lock
from mlenv.lock.model import BaseLock, Lock, Platform, PythonLock
from mlenv.progress import SilentProgress
from mlenv.spec.reader import read_document


def a_lock(name: str, spec: str, *, glibc: str) -> Lock:
    return Lock(
        name=name,
        spec=spec,
        platform=Platform(glibc=glibc),
        base=BaseLock(name="debian:12", suite="bookworm", packages=()),
        python=PythonLock(version="3.11.2", source="debian:12", interpreter="/usr/bin/python3.11"),
    )


class Remarks(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture
def spec(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "home"))
    path = tmp_path / "x.yaml"
    path.write_text("python: '3.11'\n")
    return path


@pytest.fixture
def resolved(monkeypatch) -> list[str]:
    """The names of the specs that were resolved; the resolver itself has tests of its own."""
    names: list[str] = []

    def resolve_spec(spec, *, mirror, progress):
        names.append(spec.name)
        return a_lock(spec.name, spec.digest, glibc="2.36")

    monkeypatch.setattr(environment, "resolve_spec", resolve_spec)
    return names


class TestEnsureLock:
    def test_a_missing_lock_is_resolved_and_written_beside_the_spec(self, spec, resolved):
        lock = environment.ensure_lock(spec, progress=SilentProgress())
        assert resolved == ["x"]
        assert read_lock(spec.with_name("x.lock.json")) == lock

    def test_a_matching_lock_is_used_as_it_is(self, spec, resolved):
        digest = read_document(spec).digest
        write_lock(spec.with_name("x.lock.json"), a_lock("x", digest, glibc="2.31"))
        lock = environment.ensure_lock(spec, progress=SilentProgress())
        assert (resolved, lock.platform.glibc) == ([], "2.31")

    def test_an_older_lock_is_never_passed_over_in_silence(self, spec, resolved):
        environment.ensure_lock(spec, progress=SilentProgress())
        spec.write_text("python: '3.12'\n")
        progress = Remarks()
        environment.ensure_lock(spec, progress=progress)
        assert resolved == ["x", "x"]
        assert progress.notes[0].endswith("belongs to an older form of `x.yaml`: resolving again")

    def test_upgrade_resolves_again(self, spec, resolved):
        environment.ensure_lock(spec, progress=SilentProgress())
        environment.ensure_lock(spec, upgrade=True, progress=SilentProgress())
        assert resolved == ["x", "x"]

    def test_a_read_only_spec_keeps_its_lock_with_our_data(self, spec, resolved, monkeypatch):
        def refuse(path, lock):
            if path.parent == spec.parent:
                raise PermissionError(13, "Permission denied", str(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_lock(path, lock)

        monkeypatch.setattr(environment, "write_lock", refuse)
        progress = Remarks()
        environment.ensure_lock(spec, progress=progress)
        again = environment.ensure_lock(spec, progress=progress)
        assert (resolved, again.name) == (["x"], "x")
        assert "Permission denied" in progress.notes[0]


def fail(error: BaseException, *callbacks) -> None:
    with environment.undo_on_failure() as undo:
        for callback, argument in callbacks:
            undo.callback(callback, argument)
        raise error


@pytest.mark.usefixtures("resolved")
class TestFullDisk:
    def test_it_is_not_taken_for_a_read_only_one(self, spec, monkeypatch):
        def full(path, lock):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(environment, "write_lock", full)
        with pytest.raises(OSError, match="No space left"):
            environment.ensure_lock(spec, progress=SilentProgress())


class TestUndo:
    def test_nothing_is_undone_when_all_went_well(self):
        undone = []
        with environment.undo_on_failure() as undo:
            undo.callback(undone.append, 1)
        assert undone == []

    def test_a_failure_undoes_the_last_first(self):
        undone = []
        with pytest.raises(KeyboardInterrupt):
            fail(KeyboardInterrupt(), (undone.append, 1), (undone.append, 2))
        assert undone == [2, 1]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_second_polite_end_does_not_cut_the_undo_short(self, number):
        def interrupt(number, frame):
            raise KeyboardInterrupt

        undone = []
        before = signal.signal(number, interrupt)
        try:
            with pytest.raises(ValueError, match="first"):
                fail(ValueError("first"), (undone.append, 1), (signal.raise_signal, number))
            assert undone == [1]
            assert signal.getsignal(number) is interrupt
        finally:
            signal.signal(number, before)


class TestOneAtATime:
    def test_the_second_waits_for_the_first_and_no_file_stays(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MLENV_HOME", str(tmp_path))
        order = []
        inside = threading.Event()

        def second():
            inside.wait(10)
            with environment._one_at_a_time("x"):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        with environment._one_at_a_time("x"):
            inside.set()
            thread.join(0.2)
            order.append("first")
        thread.join(10)
        assert order == ["first", "second"]
        assert list((tmp_path / "run" / "environments").iterdir()) == []

    def test_other_names_do_not_wait(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MLENV_HOME", str(tmp_path))
        with environment._one_at_a_time("x"), environment._one_at_a_time("y"):
            assert len(list((tmp_path / "run" / "environments").iterdir())) == 2


@pytest.mark.parametrize("folder", ["/", "/usr", "/etc"])
def test_the_systems_directories_are_no_notebook_folders(folder):
    with pytest.raises(MlenvError, match="cannot be the notebook folder"):
        environment.project_folder(Path(folder))


def test_a_notebook_folder_is_a_real_path(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert environment.project_folder(tmp_path / "link") == (tmp_path / "real").resolve()
