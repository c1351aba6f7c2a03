"""The container core: an OCI bundle becomes a running container, as root or as any user, without a daemon."""
