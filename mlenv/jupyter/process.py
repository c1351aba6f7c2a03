"""The process that becomes the JupyterLab server: `python -m mlenv.jupyter.process FD`.

FD is the read end of a pipe whose other end the starting command holds. A byte on it means that the command
knows the server and has written its state; its end without a byte means that the command died, so the server
ends too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> None:
    """Watch the starter and run JupyterLab."""
    descriptor = int(sys.argv.pop(1))
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_unless_known, args=(descriptor,), name="starter", daemon=True).start()
    from jupyterlab.labapp import main as lab  # type: ignore[import-untyped]

    sys.argv[0] = "jupyter-lab"
    sys.exit(lab())


def _end_unless_known(descriptor: int) -> None:
    known = os.read(descriptor, 1)
    os.close(descriptor)
    if not known:
        os.kill(os.getpid(), signal.SIGKILL)  # no kernel can run yet: nobody has had the token


if __name__ == "__main__":
    main()
