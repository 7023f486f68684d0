"""Silences the logging of other libraries in the processes of gpuprep."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Silence pydicom's log; its relevant messages appear in reasons."""
    logger = logging.getLogger("pydicom")
    logger.addHandler(logging.NullHandler())  # without a handler, Python's last-resort handler would print
    logger.propagate = False  # setting the level has no lasting effect, since importing pydicom sets it
