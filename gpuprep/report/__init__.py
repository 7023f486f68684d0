"""Report page of a cohort (table, pictures, distributions, flags), and inspection of a single series."""
