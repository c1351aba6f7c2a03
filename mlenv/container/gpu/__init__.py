"""GPUs of the host: what there is, and what a container gets of it."""
