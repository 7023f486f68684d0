"""A cohort from folders to volumes: what to convert, the conversion of each series, the record of it."""
