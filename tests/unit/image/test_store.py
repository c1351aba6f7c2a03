"""The store: nothing half-made is ever seen, and what dead processes left is swept."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlenv.errors import ImageError, StoreError
from mlenv.image.digest import digest_of
from mlenv.image.layer import write_layer
from mlenv.image.store import Store, explain_os_errors, remove_tree

KEY = digest_of(b"a tree")


def add(store, key=KEY, text="content"):
    with store.workspace() as work:
        (work / "tree/fs").mkdir(parents=True)
        (work / "tree/fs/file").write_text(text)
        facts = write_layer([work / "tree/fs"])
        return store.add_tree(key, work / "tree", facts.meta, facts.index)


def leftovers(store):
    return [path for name in ("tmp", "trash") for path in (store.root / name).iterdir()]


def test_a_tree_is_found_again_with_its_facts(store):
    tree = add(store)
    assert store.tree(KEY) == tree
    assert (tree.fs / "file").read_text() == "content"
    assert (tree.files, tree.size) == (1, 7)
    assert [path for path, _ in store.tree_index(KEY)] == ["file"]
    assert leftovers(store) == []


def test_only_its_owner_enters_the_store(store):
    """Images hold setuid programs; a store of an older version is closed when it is opened."""
    assert store.root.stat().st_mode & 0o777 == 0o700
    store.root.chmod(0o755)
    store.prepare()
    assert store.root.stat().st_mode & 0o777 == 0o700


def test_the_first_of_two_makers_wins(store):
    add(store, text="first")
    assert (add(store, text="second").fs / "file").read_text() == "first"
    assert leftovers(store) == []


def test_a_tree_without_its_meta_is_not_there(store):
    (store.tree_dir(KEY) / "fs").mkdir(parents=True)
    assert store.tree(KEY) is None
    assert (add(store, text="made anew").fs / "file").read_text() == "made anew"


@pytest.mark.parametrize("meta", ["", "{", "\0\0\0"])
def test_a_tree_whose_meta_a_power_cut_tore_is_not_there(store, meta):
    directory = add(store).fs.parent
    (directory / "meta.json").write_text(meta)
    assert store.tree(KEY) is None


def test_a_tree_of_another_boot_that_was_never_flushed_is_made_anew(store):
    directory = add(store).fs.parent
    (directory / "unsynced").write_text("another boot")
    assert store.tree(KEY) is None
    assert (add(store, text="made anew").fs / "file").read_text() == "made anew"


def test_a_flushed_tree_survives_a_reboot(store):
    directory = add(store).fs.parent
    assert (directory / "unsynced").exists()
    store.settle([directory])
    assert not (directory / "unsynced").exists()
    assert store.tree(KEY) is not None


def test_a_workspace_goes_when_its_block_fails(store):
    with pytest.raises(KeyboardInterrupt), store.workspace() as work:  # noqa: PT012
        (work / "deep/er").mkdir(parents=True)
        raise KeyboardInterrupt
    assert leftovers(store) == []


def test_what_a_killed_process_left_is_swept_and_what_lives_is_kept(store):
    program = (
        "import sys; from pathlib import Path; from mlenv.image.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "with store.workspace() as work:\n"
        "    (work / 'half').mkdir(); print(work, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        work = Path(process.stdout.readline().strip())
        store.prepare()
        assert (work / "half").is_dir()
        process.kill()
        process.wait()
    store.prepare()
    assert leftovers(store) == []


def test_trash_with_closed_directories_is_deleted(store):
    closed = store.root / "trash/old/closed/deeper"
    closed.mkdir(parents=True)
    (closed / "file").touch()
    closed.chmod(0)
    closed.parent.chmod(0)
    store.prepare()
    assert leftovers(store) == []


def test_removing_never_follows_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "tree")
    assert (tmp_path / "kept/file").exists()
    remove_tree(tmp_path / "missing")


def test_a_store_of_another_format_is_refused(store):
    (store.root / "VERSION").write_text("999\n")
    with pytest.raises(StoreError, match="999"):
        store.prepare()


def test_a_damaged_record_says_which_file(store):
    (store.root / "index.json").write_text("{")
    with pytest.raises(StoreError, match=r"index\.json"):
        store.index()


def test_a_name_means_the_last_image_given_to_it(store):
    for content in (b"one", b"two"):
        descriptor = {"digest": store.add_blob(content), "size": 3}
        store.name_image("demo", descriptor)
        store.name_image("other", descriptor)
    assert {name: entry["digest"] for name, entry in store.index().items()} == {
        "demo": digest_of(b"two"),
        "other": digest_of(b"two"),
    }


def test_only_one_process_makes_a_thing_at_a_time(store):
    program = (
        "import sys; from pathlib import Path; from mlenv.image.store import Store\n"
        "with Store(Path(sys.argv[1])).only_one('x'): print('in', flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(store.root)]
    with store.only_one("x"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert process.communicate(timeout=30)[0] == "in\n"


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "free some disk space"), (errno.EROFS, "MLENV_HOME"), (errno.EIO, "again")],
)
def test_system_errors_become_errors_with_a_remedy(number, said):
    with pytest.raises(StoreError, match="it failed") as caught, explain_os_errors("it failed"):
        raise OSError(number, os.strerror(number), "/some/path")
    assert said in caught.value.hint
    assert "/some/path" in caught.value.cause


@pytest.mark.parametrize("key", ["", "sha256:short", "sha256:" + "../" * 22, "md5:" + "0" * 64])
def test_a_key_that_is_no_digest_never_becomes_a_path(tmp_path, key):
    with pytest.raises(ImageError):
        Store(tmp_path).tree_dir(key)
