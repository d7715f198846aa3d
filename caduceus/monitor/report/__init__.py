"""The report of runs: one HTML page with curves, events and differences between configurations, and PNGs beside it."""
