"""The root of our errors that a user can act on."""

from __future__ import annotations


class UserFacingError(Exception):
    """Its text is one line: what is wrong, where, and what to do. Commands print it instead of a traceback."""
