"""The same life for root, for a user with subordinate ids and for one without."""

from __future__ import annotations

import json
from pathlib import Path

from containers import User

LIFE = """
import json, subprocess, sys
from pathlib import Path
from mlenv.container import config, launching, lifecycle, state
request = json.load(sys.stdin)
def conf(*args):
    layers = [Path(request["layer"])]
    return config.runtime_config(args=args, env={"PATH": "/bin"}, layers=layers, network="none")
script = "echo hi > /file; chown 7:8 /file 2>/dev/null; echo up; sleep 1000"
c = lifecycle.create(conf("sh", "-c", script), name="mine")
lifecycle.start(c)
while not list(lifecycle.logs(c)):
    pass
done = subprocess.run(launching.exec_command(c, ["sh", "-c", "cat /file; id -u; stat -c %u /file; exit 4"]),
                      capture_output=True, text=True)
known = state.read(str(c.bundle))
lifecycle.stop(c, timeout=1)
stopped = lifecycle.find("mine")
lifecycle.remove(stopped)
left = [str(p) for p in Path(request["home"], "containers").glob("*/*")]
print(json.dumps({"exec": [done.returncode, done.stdout, done.stderr], "users": known["users"],
                  "reason": known["user_reason"], "status": str(stopped.status), "exit": stopped.exit_code,
                  "left": left}))
"""


def test_everyone_has_containers(user: User, busybox_rootfs: Path) -> None:
    done = user.python_script(LIFE, {"layer": str(busybox_rootfs), "home": str(user.home)})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    owner = "0" if user.kind == "single" else "7"
    assert found["exec"] == [4, f"hi\n0\n{owner}\n", ""]
    assert found["users"] == user.kind
    assert (found["reason"] is None) == (user.kind != "single")
    assert (found["status"], found["exit"], found["left"]) == ("stopped", 143, [])
