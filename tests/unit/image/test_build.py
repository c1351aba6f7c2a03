"""The build of an image: what is made, what is reused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from image_makers import FakeRunner, FileSources, make_lock, write_deb, write_wheel

from mlenv.errors import DownloadError, ImageError, ImageNotFoundError, StoreError
from mlenv.image import wheel as wheel_module
from mlenv.image.build import ensure_image
from mlenv.image.images import disk_usage, find_image, images
from mlenv.image.store import Store
from mlenv.progress import SilentProgress


class Notes(SilentProgress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture
def wheels(tmp_path):
    directory = tmp_path / "wheels"
    directory.mkdir()
    return [
        write_wheel(directory, name, files={f"{name}/x.py": name.encode()})
        for name in ("alpha", "beta", "gamma")
    ]


def build(lock, store, files, *, runner=None, progress=None, **options):
    sources = FileSources(files)
    image = ensure_image(
        lock,
        store=store,
        sources=sources,
        run=runner or FakeRunner(),
        progress=progress or SilentProgress(),
        **options,
    )
    return image, sources


def leftovers(store):
    return [path for name in ("tmp", "trash") for path in (store.root / name).iterdir()]


def test_an_image_is_its_trees_bottom_first(store, base_debs, wheels):
    lock = make_lock(base_debs, wheels)
    image, _ = build(lock, store, [*base_debs, *wheels], bytecode=False)
    base, skeleton, *rest = image.layers
    assert (base / "etc/machine-id").read_text() == ""
    assert str((base / "lib").readlink()) == "usr/lib"
    assert str((skeleton / "opt/env/bin/python").readlink()) == "python3.11"
    assert str((skeleton / "opt/env/bin/python3.11").readlink()) == "/usr/bin/python3.11"
    site = "opt/env/lib/python3.11/site-packages"
    assert sorted(path.name for each in rest for path in (each / site).iterdir() if path.suffix == "") == [
        "alpha",
        "beta",
        "gamma",
    ]
    assert leftovers(store) == []
    assert image.config["config"]["Env"][0].startswith("PATH=/opt/env/bin:")


def test_two_stores_give_the_same_digest(tmp_path, base_debs, wheels):
    lock = make_lock(base_debs, wheels)
    found = set()
    for name in ("one", "two"):
        image, _ = build(lock, Store(tmp_path / name), [*base_debs, *wheels], bytecode=False)
        found.add(image.digest)
    assert len(found) == 1


def test_nothing_is_asked_for_when_nothing_changed(store, base_debs, wheels):
    lock = make_lock(base_debs, wheels)
    files = [*base_debs, *wheels]
    first, sources = build(lock, store, files, bytecode=False)
    assert sorted(sources.asked) == ["alpha", "base-files", "beta", "gamma", "libc6", "python3"]
    runner = FakeRunner()
    second, sources = build(lock, store, files, runner=runner)
    assert second == first
    assert (sources.asked, runner.calls) == ([], [])


def test_one_package_more_makes_one_tree_more(store, tmp_path, base_debs, wheels):
    build(make_lock(base_debs, wheels), store, [*base_debs, *wheels], bytecode=False)
    more = write_wheel(tmp_path, "delta")
    runner = FakeRunner()
    _, sources = build(
        make_lock(base_debs, [*wheels, more]),
        store,
        [*base_debs, *wheels, more],
        runner=runner,
        bytecode=False,
    )
    assert (sources.asked, runner.calls) == (["delta"], [])


def test_a_tree_that_was_deleted_by_hand_is_made_again(store, base_debs, wheels):
    lock = make_lock(base_debs, wheels)
    first, _ = build(lock, store, [*base_debs, *wheels], bytecode=False)
    victim = first.layers[-1].parent
    victim.rename(victim.with_name("gone"))
    second, sources = build(lock, store, [*base_debs, *wheels], bytecode=False)
    assert second == first
    assert len(sources.asked) == 1


def test_a_name_follows_its_lock_back(store, tmp_path, base_debs, wheels):
    files = [*base_debs, *wheels]
    old, new = make_lock(base_debs, wheels[:1]), make_lock(base_debs, wheels)
    first, _ = build(old, store, files, bytecode=False)
    second, _ = build(new, store, files, bytecode=False)
    assert find_image(store, "demo").digest == second.digest
    build(old, store, files, bytecode=False)
    assert find_image(store, "demo").digest == first.digest


def test_packages_are_installed_in_debians_order(store, base_debs):
    runner = FakeRunner()
    build(make_lock(base_debs, []), store, base_debs, runner=runner, bytecode=False)
    script = runner.calls[0]["args"][2].splitlines()
    assert script[2] == "$dpkg --force-depends --install /mnt/base-files_1_all.deb"
    assert script[3] == "$dpkg --force-depends --install /mnt/base-files_1_all.deb /mnt/libc6_1_all.deb"
    assert script[4] == "$dpkg --force-depends --unpack /mnt/python3_1_all.deb"
    assert script[5] == "$dpkg --configure -a"
    assert runner.calls[0]["env"]["SOURCE_DATE_EPOCH"] == "1600000000"


def test_apt_packages_lie_over_the_base(store, tmp_path, base_debs):
    apt = [write_deb(tmp_path, "git", files={"usr/bin/git": b"git"})]

    def install(args, upper, mounts):
        if "apt-get" in args[2]:
            (upper / "usr/bin").mkdir(parents=True)
            (upper / "usr/bin/git").write_text("git")
            (upper / "etc").mkdir()
            (upper / "etc/resolv.conf").touch()

    runner = FakeRunner(install)
    image, _ = build(
        make_lock(base_debs, [], apt=apt), store, [*base_debs, *apt], runner=runner, bytecode=False
    )
    assert runner.calls[1]["layers"] == [image.layers[0]]
    assert (image.layers[1] / "usr/bin/git").stat().st_mtime == 1600000000
    assert not (image.layers[1] / "etc/resolv.conf").exists()
    assert not (image.layers[1] / "usr/sbin/policy-rc.d").exists()


def test_build_steps_run_over_everything_else(store, base_debs, wheels):
    def step(args, upper, mounts):
        if args[2] == "touch /made":
            (upper / "made").touch()

    runner = FakeRunner(step)
    lock = make_lock(base_debs, wheels, build=["touch /made", "false || true"])
    image, _ = build(lock, store, [*base_debs, *wheels], runner=runner, bytecode=False)
    assert [call["args"][2] for call in runner.calls[1:]] == ["touch /made", "false || true"]
    assert runner.calls[1]["layers"] == list(image.layers[:-2])
    assert (image.layers[-2] / "made").exists()
    assert image.config["history"][-1] == {"created_by": "mlenv: false || true"}


def test_a_failed_command_shows_its_last_words_and_leaves_nothing(store, base_debs):
    with pytest.raises(ImageError) as caught:
        build(make_lock(base_debs, []), store, base_debs, runner=FakeRunner(lambda *_: 3))
    assert "status 3" in caught.value.message
    assert "the last line" in caught.value.cause
    assert leftovers(store) == []
    assert images(store) == []


def test_an_interrupted_build_goes_on_where_it_was(store, base_debs, wheels):
    lock = make_lock(base_debs, wheels)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(lock, store, [*base_debs, *wheels], runner=FakeRunner(interrupt))
    assert leftovers(store) == []
    assert images(store) == []
    done = {path.parent.name for path in (store.root / "trees").rglob("meta.json")}
    _, sources = build(lock, store, [*base_debs, *wheels], bytecode=False)
    assert set(sources.asked) >= {"base-files", "libc6", "python3"}
    assert len([name for name in sources.asked if name in {"alpha", "beta", "gamma"}]) == 3 - len(done)


def test_a_failing_wheel_is_reported_and_the_others_are_kept(store, tmp_path, base_debs, wheels):
    bad = write_wheel(tmp_path, "zeta", record="zeta/__init__.py,sha256=AAAA,10\n")
    lock = make_lock(base_debs, [*wheels, bad])
    with pytest.raises(ImageError, match="RECORD"):
        build(lock, store, [*base_debs, *wheels, bad], bytecode=False)
    assert leftovers(store) == []
    _, sources = build(make_lock(base_debs, wheels), store, [*base_debs, *wheels], bytecode=False)
    assert sources.asked == []


def test_a_file_that_is_not_the_locked_one_is_refused(store, base_debs, wheels):
    lock = make_lock(base_debs, wheels)
    sources = FileSources([*base_debs, *wheels])
    wheels[0].write_bytes(wheels[0].read_bytes() + b"x")
    with pytest.raises(DownloadError, match="not the file that was locked"):
        ensure_image(lock, store=store, sources=sources, run=FakeRunner(), progress=SilentProgress())
    assert leftovers(store) == []


def test_a_full_disk_is_explained(store, base_debs, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/store/tmp/x")

    monkeypatch.setattr("mlenv.image.bootstrap.normalise", full)
    with pytest.raises(StoreError, match="cannot be stored") as caught:
        build(make_lock(base_debs, []), store, base_debs)
    assert "free some disk space" in caught.value.hint
    assert leftovers(store) == []


def test_bytecode_is_mounted_above_its_tree_and_changes_no_digest(store, tmp_path, base_debs, wheels):
    def compile_all(args, upper, mounts):
        if "-c" in args and "py_compile" in args[-3]:
            out = mounts[0][0]
            for line in (out / "list").read_text().split("\0")[:-1]:
                number, _, path = line.partition(" ")
                target = out / number / path[1:] / "__pycache__"
                target.mkdir(parents=True)
            return 0
        return None

    lock, files = make_lock(base_debs, wheels), [*base_debs, *wheels]
    runner = FakeRunner(compile_all)
    image, _ = build(lock, store, files, runner=runner)
    assert len(runner.calls) == 2
    with_bytecode = [path for path in image.layers if "pyc" in path.parts]
    assert len(with_bytecode) == len(image.trees)
    for path in with_bytecode:
        assert image.layers[image.layers.index(path) - 1].parent.name == path.parent.parent.name
    plain, _ = build(lock, Store(tmp_path / "plain"), files, bytecode=False)
    assert plain.digest == image.digest
    _, _ = build(replace(lock, name="again"), store, files, runner=runner)
    assert len(runner.calls) == 2


def test_wheels_with_different_files_of_one_path_are_reported(store, tmp_path, base_debs):
    one = write_wheel(tmp_path, "one", files={"shared/x.py": b"1", "same.py": b"s"})
    two = write_wheel(tmp_path, "two", files={"shared/x.py": b"2", "same.py": b"s"})
    notes = Notes()
    build(make_lock(base_debs, [one, two]), store, [*base_debs, one, two], progress=notes, bytecode=False)
    assert len(notes.notes) == 1
    assert "site-packages/shared/x.py" in notes.notes[0]


def test_small_wheels_share_layers_and_large_ones_do_not(store, tmp_path, base_debs, monkeypatch):
    monkeypatch.setattr("mlenv.image.assembly.OWN_LAYER_SIZE", 5000)
    small = [write_wheel(tmp_path, f"small{number}") for number in range(40)]
    large = write_wheel(tmp_path, "large", files={"large/x.bin": bytes(6000)})
    lock = make_lock(base_debs, [*small, large])
    image, _ = build(lock, store, [*base_debs, *small, large], bytecode=False)
    manifest = json.loads(store.blob_path(image.digest).read_bytes())
    assert len(image.trees) == 43
    assert 3 < len(manifest["layers"]) <= 3 + 16
    assert [layer["digest"] for layer in manifest["layers"]] == image.config["rootfs"]["diff_ids"]
    assert len(image.config["history"]) == len(manifest["layers"])
    assert "large 1.0" in image.config["history"][2]["created_by"]


def test_a_second_environment_takes_only_what_differs(store, tmp_path, base_debs, wheels):
    more = write_wheel(tmp_path, "delta", files={"delta/big.bin": os.urandom(300_000)})
    files = [*base_debs, *wheels, more]
    build(make_lock(base_debs, wheels), store, files, bytecode=False)
    second, _ = build(make_lock(base_debs, [*wheels, more], name="second"), store, files, bytecode=False)
    first_row, second_row = images(store)
    assert (first_row.name, first_row.unique) == ("demo", 0)
    assert 300_000 < second_row.unique < 302_000
    assert second_row.shared == first_row.size
    usage = disk_usage(store, second)
    assert 300_000 < usage.unique < 400_000
    assert usage.shared > 0


@pytest.mark.parametrize("reference", ["demo", "demo:latest"])
def test_an_image_is_found_by_name_and_digest(store, base_debs, reference):
    image, _ = build(make_lock(base_debs, []), store, base_debs, bytecode=False)
    assert find_image(store, reference) == image
    assert find_image(store, image.digest) == image
    assert find_image(store, image.digest[7:19]) == image
    assert find_image(store, f"demo@{image.digest}") == image


@pytest.mark.parametrize("reference", ["other", "demo:2", "abcdef123456", "demo@sha256:" + "0" * 64])
def test_what_is_not_there_is_said_so(store, base_debs, reference):
    build(make_lock(base_debs, []), store, base_debs, bytecode=False)
    with pytest.raises(ImageNotFoundError, match=reference):
        find_image(store, reference)


def test_a_lock_of_a_foreign_image_is_refused(store, base_debs):
    lock = replace(make_lock(base_debs, []), base=None)
    with pytest.raises(ImageError, match="no base"):
        build(lock, store, base_debs)


def test_many_wheels_are_unpacked_by_processes(store, base_debs, wheels, monkeypatch):
    monkeypatch.setattr("mlenv.image.assembly._WORKERS_FROM", 0)
    monkeypatch.setattr(wheel_module, "unpack_wheel", None)
    lock, files = make_lock(base_debs, wheels), [*base_debs, *wheels]
    image, _ = build(lock, store, files, bytecode=False)
    assert len(image.trees) == 5


def test_a_bad_wheel_in_a_process_is_the_same_error(store, tmp_path, base_debs, monkeypatch):
    monkeypatch.setattr("mlenv.image.assembly._WORKERS_FROM", 0)
    bad = write_wheel(tmp_path, "zeta", record="zeta/__init__.py,sha256=AAAA,10\n")
    with pytest.raises(ImageError, match="RECORD"):
        build(make_lock(base_debs, [bad]), store, [*base_debs, bad], bytecode=False)
    assert leftovers(store) == []
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"image.workers" in _command(path)]


def _command(path):
    try:
        return (
            path.read_bytes()
            if path.parent.joinpath("stat").read_text().split()[3] == str(os.getpid())
            else b""
        )
    except OSError:
        return b""
