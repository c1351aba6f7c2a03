"""Reproducible, containerised ML environments as Jupyter kernels: spec, lock, image, container, kernel."""

__version__ = "0.1.0"
