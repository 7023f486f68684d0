"""dcm2niix: DICOM to one NIfTI file, without resampling."""

from __future__ import annotations

import subprocess
from pathlib import Path

import dcm2niix


def convert(folder: Path, out: Path) -> None:
    out.mkdir(parents=True)
    command = [dcm2niix.bin, "-z", "n", "-b", "n", "-f", "volume", "-o", str(out), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"dcm2niix ended with exit code {done.returncode}: {done.stdout.strip().splitlines()[-1]}")
