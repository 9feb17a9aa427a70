"""Settings of the fork server of a run; imported by the fork server before all else, and by no other process.

Its steps share the Ray that one of them may start (`run_ray.py`).

A fork server ends by itself once the run and all its steps have ended, but a step that is stopped (SIGSTOP) does not
notice that its run is gone. It is continued when its fork server ends: see `end_with_run`. So it ends with the run.

Imported modules are never freed: collecting garbage among them would take a fifth of the time, again in each step.
"""

import gc
import os
import signal

from model.system.lifeline import signal_at_parents_end
from model.system.run_ray import share_in_this_process_tree

share_in_this_process_tree()
signal_at_parents_end(signal.SIGTERM)
gc.disable()
os.register_at_fork(before=gc.freeze, after_in_child=gc.enable)
