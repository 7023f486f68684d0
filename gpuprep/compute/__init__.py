"""Arithmetic on voxels, with NumPy on the host or CuPy on a GPU."""
