"""Which kernels mlenv's server shows."""

from __future__ import annotations

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from traitlets import Bool

from mlenv.kernel.kernelspec import kernels_dir


class EnvironmentKernelSpecManager(KernelSpecManager):
    """Shows the environments' kernels and no others.

    JupyterLab opens a notebook whose kernel is missing with any other kernel of the same language, without
    asking; with the host's own Python in the list, that would be the host. The directory is read at every
    request, so an environment that comes up later appears by itself.
    """

    ensure_native_kernel = Bool(False, help="Whether the host's own Python is a kernel: it is not.")

    def _kernel_dirs_default(self) -> list[str]:
        return [str(kernels_dir())]

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return a kernelspec; unlike the base class, know no `python3` that is not in the list.

        Raises: NoSuchKernel.
        """
        if kernel_name.lower() not in self.find_kernel_specs():
            raise NoSuchKernel(kernel_name)
        return super().get_kernel_spec(kernel_name)
