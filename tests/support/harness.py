"""The evaluation harness, lm-eval, which is not in the environment of `make setup`."""

from importlib.util import find_spec

import pytest

needs_harness = pytest.mark.skipif(not find_spec("lm_eval"), reason="no lm-eval: `make harness` installs it")
