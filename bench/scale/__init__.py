"""Large cohorts, long runs, and scans of what is known."""
