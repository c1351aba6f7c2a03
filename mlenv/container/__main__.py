"""The core as a fresh process: `python -I -S PATH/__main__.py run --bundle DIR ID`.

Not run with -m, and without site: this file finds its own package, everything else is in `commands`.
"""

import gc
import os
import sys

gc.disable()  # a start makes no garbage worth a tenth of its time; the shim switches it on again
sys.path.append(__file__.rpartition("/mlenv/container/")[0])  # last: the standard library is found sooner

from mlenv.container import loading  # noqa: E402 - the path comes first

loading.install()
from mlenv.container.commands import main  # noqa: E402 - loaded the short way, like all that follows

os._exit(main(sys.argv[1:]))  # nothing is buffered, and taking an interpreter apart costs 4 ms
