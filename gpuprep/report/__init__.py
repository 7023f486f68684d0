"""A cohort on one page: a table of all series, a picture of each, distributions, and what stands out."""
