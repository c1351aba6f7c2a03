"""From starting a kernel to its first reply: in an environment's container, beside a plain local ipykernel.

Alone it prints the medians in seconds as JSON: `python bench/kernel.py [NAME]`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from jupyter_client.manager import KernelManager
from measure import Contender, Section, Target, call, race

from mlenv.jupyter.kernelspecs import EnvironmentKernelSpecManager

if TYPE_CHECKING:
    from jupyter_client.blocking.client import BlockingKernelClient

MLENV = [sys.executable, "-m", "mlenv"]
DEADLINE = 120.0

LOCAL, LOCAL_IPC, OURS = "local ipykernel (tcp)", "local ipykernel (ipc)", "mlenv kernel"
TARGETS = (Target(row=OURS, peer=LOCAL, most=1.25),)


@dataclass(slots=True)
class Start:
    """Starts a kernel with Jupyter's own manager, asks it to run a cell, and ends it."""

    kernel_name: str
    transport: str
    folder: Path
    is_ours: bool
    manager: KernelManager | None = field(default=None)
    client: BlockingKernelClient | None = field(default=None)

    def prepare(self) -> None:
        """Make a manager as a front end has it before anybody chooses a kernel."""
        specs = {"kernel_spec_manager": EnvironmentKernelSpecManager()} if self.is_ours else {}
        self.manager = KernelManager(kernel_name=self.kernel_name, transport=self.transport, **specs)
        if self.transport == "ipc":
            self.manager.ip = str(
                self.folder / "local"
            )  # the default is relative, and kernels change folders

    def run(self) -> None:
        """Return when the first cell's reply is there."""
        self.manager.start_kernel(cwd=str(self.folder))
        self.client = self.manager.client()
        self.client.start_channels(hb=False)
        request = self.client.execute("6 * 7")
        while (reply := self.client.get_shell_msg(timeout=DEADLINE))["parent_header"]["msg_id"] != request:
            continue
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"the cell failed: {reply['content']}")

    def clean(self) -> None:
        """End the kernel, untimed."""
        if self.client is not None:
            self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def contender(self, name: str) -> Contender:
        """Return this start as a row of the table."""
        return Contender(name=name, run=self.run, prepare=self.prepare, clean=self.clean)


def section(*, spec: Path | str, work: Path, rounds: int) -> Section:
    """Bring the environment of a spec up, time kernels there and on the host, and bring it down."""
    said = json.loads(call(*MLENV, "up", spec, "--no-jupyter", "--json", cwd=work))
    name = said["kernel"]
    try:
        rows = [
            Start("python3", "tcp", work, is_ours=False).contender(LOCAL),
            Start("python3", "ipc", work, is_ours=False).contender(LOCAL_IPC),
            Start(name, "tcp", work, is_ours=True).contender(OURS),
        ]
        made = race("kernel start to first reply", rows, rounds=rounds, targets=TARGETS)
    finally:
        call(*MLENV, "down", name, cwd=work)
    local = f"{sys.version.split()[0]} at {sys.prefix}"
    made.notes.append(f"the local rows run this Python, {local}; the container its own")
    return made


def main() -> None:
    """Print the medians of one run as JSON."""
    with tempfile.TemporaryDirectory(prefix="mlenv-bench-") as work:
        spec = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
        found = call(*MLENV, "build", spec).strip()
        folder = Path(work)
        (folder / "envs").symlink_to(Path(__file__).parents[1] / "envs")
        made = section(spec=spec, work=folder, rounds=int(os.environ.get("ROUNDS", "10")))
    medians = {name: round(median(times), 4) for name, times in made.times.items()}
    ratio = round(medians[OURS] / medians[LOCAL], 3)
    print(json.dumps({"schema": 1, "image": found, "seconds": medians, "ratio_to_local": ratio}, indent=1))


if __name__ == "__main__":
    main()
