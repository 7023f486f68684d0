"""The version, which needs no import."""

__version__ = "0.1.0"
