"""Runs one contender in a separate process: ``python -m bench.compare.run_contender MODULE``.

Each line on stdin is a job, ``{"folders": [...], "out": "...", "options": {...}}``. The answer is a line on stdout:
``{"seconds": ...}`` with further results of the contender, ``{"absent": reason}`` or ``{"failed": reason}``. The first
job of a process measures the cold start, later ones the steady state. Output of libraries goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench.compare.contenders import AbsentError


def answer(module: str, options: dict[str, Any], folders: list[Path], out: Path) -> dict[str, Any]:
    """Run a job and return its answer."""
    started = time.perf_counter()
    try:
        contender = importlib.import_module(f"bench.compare.contenders.{module}")
        if hasattr(contender, "convert_all"):
            results = contender.convert_all(folders, out, **options) or {}
        else:
            results = {}
            for folder in folders:
                contender.convert(folder, out / folder.name, **options)
    except ModuleNotFoundError as exc:
        return {"absent": f"{exc.name} is not installed"}
    except AbsentError as exc:
        return {"absent": str(exc)}
    except Exception as exc:  # any error of a contender is a result of the comparison
        traceback.print_exc()
        return {"failed": f"{type(exc).__name__}: {exc}"}
    return {"seconds": time.perf_counter() - started} | results


def main() -> None:
    module = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        folders = [Path(folder) for folder in job["folders"]]
        print(json.dumps(answer(module, job["options"], folders, Path(job["out"]))), file=answers)


if __name__ == "__main__":
    main()
