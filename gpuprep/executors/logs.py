"""Silences messages of other libraries in processes that are ours alone."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Keep pydicom from logging what ends up in a reason or does not matter."""
    logger = logging.getLogger("pydicom")
    logger.addHandler(logging.NullHandler())  # without any, Python's last resort would print
    logger.propagate = False  # its level would not stay: importing pydicom sets it
