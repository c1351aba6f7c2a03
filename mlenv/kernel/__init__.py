"""Jupyter kernels that run in the containers of environments, and the kernelspecs that name them."""
