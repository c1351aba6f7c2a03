"""The leak check around each test, and containers to test with."""

from __future__ import annotations

from containers import busybox_rootfs, ordinary_user, user
from leaks import home, leak_check

__all__ = ["busybox_rootfs", "home", "leak_check", "ordinary_user", "user"]
