"""REX: the decoder, its text pipeline, its training, its quantization and its generation engine.

Nothing here depends on an orchestrator, a tracker or a web server. Importing this package imports neither torch nor
transformers, so that `model.settings` and `model.errors` are cheap to import.
"""

import atexit
import gc
import os

# Read by GNU OpenMP when torch is loaded. Threads that wait for their neighbor then spin for microseconds instead of
# milliseconds before they sleep: if another process wants the core that the neighbor needs, longer spinning made a
# decoding step up to ten times as long (`bench/LOG.md`).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# Importing torch and transformers makes half a million objects that stay. With Python's default of 700 new objects it
# looks for garbage among them a thousand times meanwhile, and once more when the process ends: a third of the CPU time
# of a short process (`bench/LOG.md`).
gc.set_threshold(10_000)
atexit.register(gc.freeze)
