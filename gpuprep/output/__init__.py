"""Finished volumes and the manifest: written, verified, read again."""
