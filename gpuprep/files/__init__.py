"""Access to bytes on disk, in archives and at URLs."""
