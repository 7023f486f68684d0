"""Reads headers from their bytes and with pydicom, and compares the results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pytest

from gpuprep.dicom import element_stream, headers

READ_HEADER = headers._read_header
"""The function itself, without the comparison."""


@contextmanager
def pydicom_alone() -> Iterator[None]:
    """Read all headers with pydicom."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(element_stream, "read_ordinary_header", lambda _: None)
        yield


def read_header(f: BinaryIO, *args: Any) -> Any:
    """Do what `headers._read_header` does, and fail unless pydicom alone leads to the same images or error."""
    first = _outcome(f, *args)
    f.seek(0)
    with pydicom_alone():
        second = _outcome(f, *args)
    if _comparable(first) != _comparable(second):
        pytest.fail(f"read from the bytes: {first!r}; by pydicom: {second!r}")  # no Exception, which would be handled
    if isinstance(first, Exception):
        raise first
    return first


def _comparable(outcome: Any) -> Any:
    return (type(outcome), str(outcome), vars(outcome)) if isinstance(outcome, Exception) else outcome


def _outcome(f: BinaryIO, *args: Any) -> Any:
    try:
        return READ_HEADER(f, *args)
    except Exception as exc:
        return exc
