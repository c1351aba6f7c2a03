"""Builds the container's PID 1 where a C compiler is; without one mlenv uses its Python reaper."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py

SOURCE = Path(__file__).parent / "mlenv" / "container" / "init.c"


def compile_init(target: Path) -> None:
    """Compile init.c static to `target`; a machine that cannot gets a note, not a failure."""
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-Os", "-static", "-s", "-Wall", "-o", str(target), str(SOURCE)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"mlenv: PID 1 stays the Python reaper: {error}\n")


class BuildInit(Command):
    """`python setup.py build_init`: compile beside the source, for an editable installation."""

    user_options = []  # noqa: RUF012 - setuptools' protocol

    def initialize_options(self) -> None:
        """Have nothing to initialise."""

    def finalize_options(self) -> None:
        """Have nothing to finalise."""

    def run(self) -> None:
        """Compile."""
        compile_init(SOURCE.with_suffix(""))


class BuildWithInit(build_py):
    """Copies the package and puts the compiled init into it."""

    def run(self) -> None:
        """Build; an editable build has its init beside the source."""
        super().run()
        editable = getattr(self, "editable_mode", False)
        folder = SOURCE.parent if editable else Path(self.build_lib) / "mlenv" / "container"
        folder.mkdir(parents=True, exist_ok=True)
        compile_init(folder / "init")


setup(cmdclass={"build_init": BuildInit, "build_py": BuildWithInit})
