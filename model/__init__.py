"""REX: the decoder, its text pipeline, its training, its quantization and its generation engine.

Nothing here depends on an orchestrator, a tracker or a web server. Importing this package imports neither torch nor
transformers, so that `model.settings` and `model.errors` are cheap to import.
"""

import os

# Read by GNU OpenMP when torch is loaded. Threads that wait for their neighbor then spin for microseconds instead of
# milliseconds before they sleep: if another process wants the core that the neighbor needs, longer spinning made a
# decoding step up to ten times as long (`bench/LOG.md`).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
