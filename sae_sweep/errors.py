"""Errors that are the user's to mend: one line each, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Wrong usage or configuration. The message is one line: what is wrong, where, the nearest valid thing."""

    exit_code = 2


class EnvironmentProblem(UserError):
    """The machine is at fault (disk, permissions, GPU), not the request."""

    exit_code = 4
