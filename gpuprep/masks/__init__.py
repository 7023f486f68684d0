"""Segmentation files to label volumes on the grid of their series.

`opening` reads a file of any known kind into a `Segmentation` (`contours`), which says what it holds in the file's own
terms; `placing` puts that onto the slices of a series.
"""
