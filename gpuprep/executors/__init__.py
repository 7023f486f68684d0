"""Executors of tasks: this process, worker processes, GPUs and Dask clusters."""
