"""What a process may open, raised as far as it goes. Not here: anything else."""

from __future__ import annotations

import resource

_MAX_FILES = 20_000
"""Must match `MAX_FDS` of server.c."""


def allow_many_files() -> None:
    """Let this process open thousands of connections, as far as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
