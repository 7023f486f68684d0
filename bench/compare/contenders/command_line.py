"""The command line of gpuprep, as users run it: one process that converts with the default recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def convert_all(folders: list[Path], out: Path) -> None:
    subprocess.run([sys.executable, "-m", "gpuprep", "convert", *folders, "--out", out], check=True)
