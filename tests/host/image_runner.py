"""A Runner for tests that makes no use of mlenv's own container core: unshare, overlay and chroot, as root."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SCRIPT = """\
set -e
root=$1; upper=$2; work=$3; lower=$4; shift 4
if [ -n "$lower" ]; then mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=$work" "$root"
else mount --bind "$upper" "$root"; fi
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev"
for each in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "$root/dev/${each%:*}" c 1 "${each#*:}"; done
while [ "$1" != -- ]; do mount --bind "$1" "$root$2"; shift 2; done
shift
cd /
exec chroot "$root" "$@"
"""


class ChrootRunner:
    """Runs commands as the Runner protocol asks, with what every root shell has."""

    def __init__(self):
        self.calls = []

    def run(self, args, *, layers, upper, env, cwd="/", network=False, mounts=(), log):
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
                ["unshare", "--mount", "--pid", "--fork", "sh", "-c", _SCRIPT, "sh",
                 str(root), str(upper), str(work), lower, *shown, "--", *args],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(env), cwd=links, check=False,
            )
        return done.returncode
