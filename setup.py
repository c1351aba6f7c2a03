"""Build the one thing that is not Python: PID 1 of a container, a static program of a page of C."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SOURCE = Path("mlenv/container/init.c")


class BuildPackage(build_py):
    """Compile `init` beside the modules, and put the catalog of specs into a package that is not editable."""

    def run(self) -> None:
        """Copy the package and compile; without a C compiler the core uses its PID 1 in Python."""
        super().run()
        root = Path() if self.editable_mode else Path(self.build_lib)
        if (reason := compile_init(root / SOURCE.with_suffix(""))) is not None:
            self.warn(f"{reason}: containers get the reaper in Python as PID 1")
        if not self.editable_mode:
            shutil.copytree("envs", root / "mlenv" / "catalog", dirs_exist_ok=True)


class Wheel(bdist_wheel):
    """A wheel for any Python 3 on this platform, because of the compiled program."""

    def finalize_options(self) -> None:
        """Mark the wheel as one with a binary."""
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


def compile_init(target: Path) -> str | None:
    """Compile to `target` by way of a temporary name, so that it is whole or not there; return why not."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "there is no C compiler"
    partial = target.with_suffix(".partial")
    command = [compiler, "-std=gnu11", "-Os", "-s", "-static", "-Wall", "-Wextra", "-o", partial, SOURCE]
    if subprocess.run(command, check=False).returncode != 0:
        return "there is no static C library"
    partial.replace(target)
    return None


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
