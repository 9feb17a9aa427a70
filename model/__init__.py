"""REX: the decoder, its text pipeline, its training, its quantization and its generation engine.

Nothing here knows an orchestrator, a tracker or a web server. Importing this package imports neither torch nor
transformers, so that `model.settings` and `model.errors` are cheap to use from a Dagster code location.
"""

import os

# Read by OpenMP when torch is loaded. Threads that wait for their neighbour then sleep instead of spinning: where another
# process wants the core that the neighbour needs, spinning made a decoding step 4 to 10 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
