"""Benchmarks of large cohorts, long runs, and repeated scans."""
