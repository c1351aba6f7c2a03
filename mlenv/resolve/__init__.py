"""From a spec to a lock: versions chosen from the compatibility data, packages pinned by uv and apt."""
