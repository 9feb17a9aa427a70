"""Ends the fork server of a run with the run's process; imported by the fork server, and by no other process.

A fork server ends by itself once the run and all its steps have ended, but a step that is stopped (SIGSTOP) does not
notice that its run is gone. It is continued when its fork server ends: see `end_with_run`.
"""

import signal

from model.system.lifeline import signal_at_parents_end

signal_at_parents_end(signal.SIGTERM)
