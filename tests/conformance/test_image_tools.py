"""Saved images, read by tools we did not write."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from image_makers import FakeRunner, FileSources, make_lock, write_deb, write_wheel

from mlenv.image.build import ensure_image
from mlenv.image.save import save, save_directory
from mlenv.image.store import Store
from mlenv.image.wheel import unpack_wheel
from mlenv.progress import SilentProgress


def _change_base(args, upper, mounts):
    """Do to an upper directory what overlay does: remove a file, replace a directory, add files."""
    if "apt-get" in args[2]:
        (upper / "etc/old.d").mkdir(parents=True)
        os.setxattr(upper / "etc/old.d", "trusted.overlay.opaque", b"y")
        (upper / "etc/old.d/new").write_text("new")
        os.mknod(upper / "etc/debian_version", stat.S_IFCHR, 0)
        (upper / "usr/bin").mkdir(parents=True)
        (upper / "usr/bin/git").write_text("git")
        (upper / "usr/bin/git").chmod(0o4755)
        (upper / "usr/bin/git-link").hardlink_to(upper / "usr/bin/git")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLENV_HOME", str(tmp_path / "home"))
    debs = [
        write_deb(
            tmp_path,
            "base-files",
            essential=True,
            files={"etc/debian_version": b"12\n", "etc/old.d/a": b"a", "etc/old.d/b": b"b", "etc/kept": b"k"},
        )
    ]
    apt = [write_deb(tmp_path, "git")]
    wheels = [
        write_wheel(tmp_path, name, files={f"{name}/{'long' * 40}.py": b"x"}) for name in ("alpha", "beta")
    ]
    wheels.append(write_wheel(tmp_path, "large", files={"large/data.bin": os.urandom(1_200_000)}))
    store = Store(tmp_path / "store")
    ensure_image(
        make_lock(debs, wheels, apt=apt),
        store=store,
        sources=FileSources([*debs, *apt, *wheels]),
        run=FakeRunner(_change_base),
        progress=SilentProgress(),
        bytecode=False,
    )
    return store


def output(*args, **options):
    return subprocess.run(args, check=True, capture_output=True, text=True, **options).stdout


def listing(root):
    """Return type, mode, size and target of every path of a tree."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        size = status.st_size if stat.S_ISREG(status.st_mode) else None
        target = str(path.readlink()) if path.is_symlink() else None
        found[str(path.relative_to(root))] = (
            stat.filemode(status.st_mode),
            size,
            int(status.st_mtime),
            target,
        )
    return found


@pytest.mark.requires("root", "skopeo")
@pytest.mark.parametrize("form", ["archive", "directory"])
def test_skopeo_reads_what_was_saved(store, tmp_path, form):
    if form == "archive":
        with (tmp_path / "image.tar").open("wb") as file:
            save(store, "demo", file)
        place = f"oci-archive:{tmp_path}/image.tar:demo"
    else:
        save_directory(store, "demo", tmp_path / "image")
        place = f"oci:{tmp_path}/image:demo"
    digest = store.index()["demo"]["digest"]
    seen = json.loads(output("skopeo", "inspect", place))
    assert seen["Digest"] == digest
    assert (seen["Architecture"], seen["Os"]) == ("amd64", "linux")
    assert "PATH=/opt/env/bin" in seen["Env"][0]
    output("skopeo", "copy", place, f"dir:{tmp_path}/copy")
    blobs = [path for path in (tmp_path / "copy").iterdir() if len(path.name) == 64]
    assert len(blobs) == len(set(seen["Layers"])) + 1


@pytest.mark.requires("root", "umoci", "overlay")
def test_umoci_unpacks_the_tree_that_overlay_shows(store, tmp_path):
    save_directory(store, "demo", tmp_path / "image")
    output("umoci", "unpack", "--image", f"{tmp_path}/image:demo", str(tmp_path / "bundle"))
    record = json.loads(store.image_record(store.index()["demo"]["digest"]).read_bytes())
    lowers = [store.tree_dir(key) / "fs" for layer in record["layers"] for key in layer["trees"]]
    merged, copy = tmp_path / "merged", tmp_path / "copy"
    merged.mkdir()
    options = "lowerdir=" + ":".join(os.path.relpath(each, tmp_path) for each in reversed(lowers))
    script = f"mount -t overlay overlay -o '{options}' merged && cp -a merged copy"
    output("unshare", "--mount", "sh", "-c", script, cwd=tmp_path)
    unpacked, ours = listing(tmp_path / "bundle/rootfs"), listing(copy)
    assert "etc/debian_version" not in ours
    assert "etc/old.d/a" not in ours
    assert ours["usr/bin/git"][0] == "-rwsr-xr-x"
    assert unpacked == ours
    assert (tmp_path / "bundle/rootfs/usr/bin/git").samefile(tmp_path / "bundle/rootfs/usr/bin/git-link")


@pytest.mark.requires("root")
def test_a_changed_tree_does_not_leave_the_store(store, tmp_path):
    from mlenv.errors import StoreError

    record = json.loads(store.image_record(store.index()["demo"]["digest"]).read_bytes())
    victim = store.tree_dir(record["layers"][0]["trees"][0]) / "fs/etc/kept"
    victim.write_bytes(b"K")
    with pytest.raises(StoreError, match="changed"):
        save(store, "demo", io.BytesIO())
    with pytest.raises(StoreError, match="changed"):
        save_directory(store, "demo", tmp_path / "image")
    assert not (tmp_path / "image").exists()


@pytest.mark.requires("index")
@pytest.mark.parametrize(
    "requirement",
    ["jinja2==3.1.6", "jupyter_core==5.7.2", "debugpy==1.8.14", "numpy==2.2.6", "widgetsnbextension==4.0.14"],
)
def test_a_wheel_unpacks_to_the_files_that_uv_installs(tmp_path, requirement):
    arguments = ["-q", "--no-deps", "--only-binary", ":all:", "-d", str(tmp_path / "wheel"), requirement]
    output(sys.executable, "-m", "pip", "download", *arguments)
    wheel = next((tmp_path / "wheel").iterdir())
    (tmp_path / "ours").mkdir()
    minor = f"{sys.version_info[0]}.{sys.version_info[1]}"
    unpack_wheel(wheel, tmp_path / "ours", python=minor)
    output(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    uv = [sys.executable, "-m", "uv"]
    install = ["pip", "install", "-q", "--no-deps", "--offline", "--no-index", "--no-cache", str(wheel)]
    output(*uv, *install, "--python", str(tmp_path / "venv/bin/python"))
    ours, theirs = tmp_path / "ours/opt/env", tmp_path / "venv"
    before = {"bin/python", "bin/python3", f"bin/python{minor}", "pyvenv.cfg", "lib64"}
    expected = {
        str(path.relative_to(theirs)): path
        for path in theirs.rglob("*")
        if path.is_file() and not _is_venvs(path, theirs, before)
    }
    found = {str(path.relative_to(ours)): path for path in ours.rglob("*") if path.is_file()}
    ignored = {"REQUESTED", "direct_url.json", "uv_cache.json"}
    assert set(found) == {name for name in expected if Path(name).name not in ignored}
    generated = {
        name for name in found if name.startswith("bin/") or Path(name).name in {"RECORD", "INSTALLER"}
    }
    assert [
        name for name in set(found) - generated if found[name].read_bytes() != expected[name].read_bytes()
    ] == []
    assert {
        name for name in generated if name.startswith("bin/") and not os.access(found[name], os.X_OK)
    } == set()


def _is_venvs(path, root, before):
    relative = str(path.relative_to(root))
    return (
        relative in before
        or relative.startswith(("lib64/", "bin/activate", "bin/Activate", "."))
        or "_virtualenv" in relative
    )
