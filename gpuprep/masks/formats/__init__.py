"""Readers of segmentation files, one module for each format."""
