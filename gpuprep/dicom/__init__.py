"""DICOM files to series, and series to stored values."""
