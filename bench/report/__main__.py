"""`python -m bench.report`: see `report.py`."""

import sys

from bench.report.report import main

sys.exit(main())
