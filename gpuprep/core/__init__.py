"""Values that every other room speaks of: geometry, series, volumes, recipes, plans."""
