"""Data types used by all other packages: geometry, series, volumes, recipes, plans."""
