"""File descriptors for connections."""

import resource

SPARE_FILES = 128
"""File descriptors reserved for libraries, the model and logs."""


def usable_connections(wanted: int) -> int:
    """`wanted`, or fewer if the process's file limit is lower; raises that limit as far as allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, min(wanted, limit - SPARE_FILES))
