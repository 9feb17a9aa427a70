"""`python -m llm_assets.experiments`: see `compose.py`."""

import sys

from llm_assets.experiments.compose import main

sys.exit(main())
