"""Segmentation files to label volumes on the grid of their series.

`read` reads a file of any known kind into a `Segmentation` (`model`), which says what it holds in the terms of the
file; `place_on_slices` puts that onto the slices of a series.
"""
