"""The pipeline's benchmark report: quality, timings, memory, plots and Markdown."""
