"""The fixtures of an object store: `server`, and `root`, an address in it."""

from tests.support.s3 import root, server  # noqa: F401
