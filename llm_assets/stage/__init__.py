"""One materialization: settings, upstream, workspace, tracking, interrupts, metadata."""
