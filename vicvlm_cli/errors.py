"""The errors a user can mend. Everything else is a bug and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake a user can mend: one sentence on what is wrong, where, and what to do next."""

    exit_code = 1


class UsageError(UserError):
    """A command line or configuration that makes no sense before any work has begun."""

    exit_code = 2


class OwnError(UserError):
    """What one process of a launch met alone, so that no other can tell of it."""
