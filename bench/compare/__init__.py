"""Comparison of gpuprep with other programs, disk to disk."""
