"""The native library, which `make setup` compiles if there is a C++ compiler."""

import pytest

from model.native.build import LIBRARY, find_compiler

MISSING = f"no C++ compiler and no {LIBRARY.name}: install g++"
# A library that was built and does not load is an error, not a reason to skip.
IS_MISSING = find_compiler() is None and not LIBRARY.is_file()
needs_native = pytest.mark.skipif(IS_MISSING, reason=MISSING)
