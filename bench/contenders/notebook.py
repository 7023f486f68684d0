"""The widely copied notebook, `bench/classic.py`."""

from __future__ import annotations

from pathlib import Path

from bench import classic


def convert(folder: Path, out: Path) -> None:
    classic.convert(str(folder), str(out))
