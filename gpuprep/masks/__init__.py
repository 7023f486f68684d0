"""Segmentation files to label volumes on the grid of their series.

`read` reads a file of any known format into a `Segmentation` (`model`), in the coordinates of the file;
`place_on_slices` maps it to the slices of a series.
"""
