"""Patches on pinned upstream repositories: check them, build the patched copy, look after them. Knows only git."""

from flatpatch.patches.checks import Verified, fetch_command, inserted_lines, verified_once, verify, verify_patches
from flatpatch.patches.cli import cli
from flatpatch.patches.copies import Built, build, copy_path
from flatpatch.patches.gitcalls import check_git, in_checkout
from flatpatch.patches.upkeep import Drift, drift, refresh, show
from flatpatch.patches.workspace import (
    PROJECT,
    Workspace,
    find_checkout,
    is_available,
    nothing_fetched,
    skipped_checkouts,
)

__all__ = [
    "PROJECT",
    "Built",
    "Drift",
    "Verified",
    "Workspace",
    "build",
    "check_git",
    "cli",
    "copy_path",
    "drift",
    "fetch_command",
    "find_checkout",
    "in_checkout",
    "inserted_lines",
    "is_available",
    "nothing_fetched",
    "skipped_checkouts",
    "refresh",
    "show",
    "verified_once",
    "verify",
    "verify_patches",
]
