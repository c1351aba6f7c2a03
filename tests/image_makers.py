"""Wheels, Debian packages, locks and Runners for the tests of images."""

from __future__ import annotations

import base64
import hashlib
import io
import lzma
import subprocess
import tarfile
import zipfile
from pathlib import Path

from mlenv.image.digest import sha256_of_file
from mlenv.lock.model import BaseLock, DebPackage, Lock, Platform, PythonLock, Wheel


def record_row(name, content):
    value = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={value},{len(content)}\n"


def write_wheel(
    directory,
    name="demo",
    version="1.0",
    files=None,
    *,
    record=None,
    compression=zipfile.ZIP_DEFLATED,
    modes=None,
):
    """Write a wheel of `files` (name to bytes) with METADATA, WHEEL and a right RECORD or the given one."""
    path = Path(directory) / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    content = {
        f"{name}/__init__.py": b"value = 1\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(files or {}),
    }
    rows = "".join(record_row(each, data) for each, data in content.items()) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for each, data in {
            **content,
            f"{info}/RECORD": (rows if record is None else record).encode(),
        }.items():
            member = zipfile.ZipInfo(each, (2020, 1, 1, 0, 0, 0))
            member.external_attr = (0o100644 if each not in (modes or {}) else 0o100000 | modes[each]) << 16
            member.compress_type = compression
            archive.writestr(member, data)
    return path


def write_deb(directory, name, *, version="1", essential=False, depends="", files=None, compression="xz"):
    """Write a Debian package of `files` (path to bytes), with members compressed as `compression` says."""
    path = Path(directory) / f"{name}_{version}_all.deb"
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nDescription: a test\n with two lines\n"
    )
    control += "Essential: yes\n" if essential else ""
    control += f"Depends: {depends}\n" if depends else ""
    members = [
        (b"debian-binary", b"2.0\n"),
        (b"control.tar." + compression.encode(), _packed({"control": control.encode()}, compression)),
        (b"data.tar." + compression.encode(), _packed(files or {}, compression)),
    ]
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for member, data in members:
            file.write(b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (member, 0, 0, 0, b"100644", len(data)))
            file.write(data + b"\n" * (len(data) % 2))
    return path


def _packed(files, compression):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mtime, member.mode = len(data), 1600000000, 0o644
            tar.addfile(member, io.BytesIO(data))
    if compression == "gz":
        import gzip

        return gzip.compress(buffer.getvalue())
    return lzma.compress(buffer.getvalue())


class FakeRunner:
    """Does to the root what dpkg and compileall would leave behind, and remembers what it was asked."""

    def __init__(self, effect=None):
        self.calls = []
        self.effect = effect

    def run(self, args, *, layers, upper, env, cwd="/", network=False, mounts=(), log):  # noqa: ARG002 - the protocol's
        self.calls.append({"args": list(args), "layers": list(layers), "upper": upper, "env": dict(env)})
        Path(log).write_text("some output\nthe last line\n")
        return (self.effect(args, upper, mounts) if self.effect else 0) or 0


class FileSources:
    """Finds everything as a file; counts what was asked for."""

    def __init__(self, paths):
        self.paths = {sha256_of_file(path): path for path in paths}
        self.asked = []

    def wheel_url(self, wheel):
        self.asked.append(wheel.name)
        return self.paths[wheel.sha256].as_uri()

    def deb_url(self, package):
        self.asked.append(package.name)
        return self.paths[package.sha256].as_uri()

    def python_archive(self, python, directory):  # noqa: ARG002 - the protocol's
        raise AssertionError("no test uses a standalone Python")


def wheel_lock(path):
    name, version = path.name.split("-")[:2]
    return Wheel(
        name=name, version=version, filename=path.name, sha256=sha256_of_file(path), size=path.stat().st_size
    )


def deb_lock(path):
    name, version, _ = path.stem.split("_")
    return DebPackage(
        name=name,
        version=version,
        architecture="all",
        path=f"pool/{path.name}",
        archive="main",
        sha256=sha256_of_file(path),
        size=path.stat().st_size,
    )


def make_lock(debs, wheels, *, name="demo", apt=(), build=()):
    return Lock(
        name=name,
        spec="sha256:" + "0" * 64,
        platform=Platform(glibc="2.36"),
        base=BaseLock(name="debian:12", suite="bookworm", packages=tuple(deb_lock(deb) for deb in debs)),
        apt=tuple(deb_lock(deb) for deb in apt),
        python=PythonLock(version="3.11.2", source="debian:12", interpreter="/usr/bin/python3.11"),
        wheels=tuple(wheel_lock(wheel) for wheel in sorted(wheels)),
        build=tuple(build),
    )


_SCRIPT = """\
set -e
root=$1; upper=$2; work=$3; lower=$4; shift 4
if [ -n "$lower" ]; then mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" "$root"
else mount --bind "$upper" "$root"; fi
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev"
for each in null:3 zero:5 full:7 random:8 urandom:9; do
  mknod -m 666 "$root/dev/${each%:*}" c 1 "${each#*:}"
done
while [ "$1" != -- ]; do mount --bind "$1" "$root$2"; shift 2; done
shift
cd /
exec chroot "$root" "$@"
"""


class ChrootRunner:
    """Runs commands as the Runner protocol asks, with what every root shell has."""

    def __init__(self):
        self.calls = []

    def run(self, args, *, layers, upper, env, cwd="/", network=False, mounts=(), log):  # noqa: ARG002 - the protocol's
        self.calls.append(list(args))
        root, work = upper.with_name("chroot-root"), upper.with_name("chroot-work")
        root.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        shown = [part for source, target in mounts for part in (str(source), target)]
        # Overlay's option string holds few long paths, so the layers are seen through short names.
        links = upper.with_name("l")
        links.mkdir(exist_ok=True)
        for number, layer in enumerate(layers):
            (links / str(number)).unlink(missing_ok=True)
            (links / str(number)).symlink_to(layer)
        lower = ":".join(str(number) for number in reversed(range(len(layers))))
        with Path(log).open("ab") as output:
            done = subprocess.run(
                [
                    "unshare",
                    "--mount",
                    "--pid",
                    "--fork",
                    "sh",
                    "-c",
                    _SCRIPT,
                    "sh",
                    str(root),
                    str(upper),
                    str(work),
                    lower,
                    *shown,
                    "--",
                    *args,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(env),
                cwd=links,
                check=False,
            )
        return done.returncode
