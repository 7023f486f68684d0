"""Bytes, wherever they lie: on disk, in an archive, at a URL."""
