"""The native library, which `make setup` compiles if there is a C++ compiler."""

import pytest

from model.native.build import LIBRARY
from model.native.library import open_library

MISSING = f"no C++ compiler and no {LIBRARY.name}: install g++"
needs_native = pytest.mark.skipif(open_library() is None, reason=MISSING)
