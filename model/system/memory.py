"""Peak memory of processes."""

import resource
import sys

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of `ru_maxrss`."""


def peak_resident_bytes(who: int = resource.RUSAGE_SELF) -> int:
    """Largest resident set so far, in bytes: of this process, or with RUSAGE_CHILDREN of its largest ended child."""
    return resource.getrusage(who).ru_maxrss * _UNIT
