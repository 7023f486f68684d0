"""The widely copied notebook, `bench/compare/classic.py`."""

from __future__ import annotations

from pathlib import Path

from bench.compare import classic


def convert(folder: Path, out: Path) -> None:
    classic.convert(str(folder), str(out))
