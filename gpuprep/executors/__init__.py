"""Processes, GPUs and clusters that tasks run on."""
