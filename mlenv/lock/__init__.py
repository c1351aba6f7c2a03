"""The lock: an environment with everything pinned, and its canonical file."""
