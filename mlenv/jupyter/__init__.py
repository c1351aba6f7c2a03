"""The JupyterLab server: one for each `MLENV_HOME`, on the host, showing the kernels of the environments."""
