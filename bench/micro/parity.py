"""Compares a backend with NumPy and SciPy on the host, in HU, on a series of a usual size.

    python -m bench.micro.parity [--backend gpu] [--out bench/results/parity-….json]

The series is a phantom of 108 × 512 × 512 at 3 × 0.6816 × 0.6816 mm, resampled to 1 mm without a window, and by the
default recipe. The host takes half a minute for the engine ``ndimage``. Figures are written after each row; the exit
code is 1 if a difference is too large.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.measure import save, shape_argument
from gpuprep.compute.backend import Engine, get_backend
from gpuprep.compute.gpu_checks import largest_difference_hu, limit_hu
from gpuprep.core.plan import make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.errors import BackendError
from gpuprep.testing import thorax_volume

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
ROWS: tuple[tuple[Engine, str, Recipe], ...] = (
    ("operators", "HU", Recipe(window_hu=None, size=None)),
    ("operators", "default recipe", Recipe()),
    ("ndimage", "HU", Recipe(window_hu=None, size=None)),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape_argument, default=SHAPE, help="shape of the phantom: a small one to test")
    parser.add_argument("--backend", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    try:
        backend = get_backend(args.backend)
    except BackendError as exc:
        print(f"no figures without a GPU: {exc}", file=sys.stderr)
        return exc.exit_code
    volume = thorax_volume(args.shape, SPACING_MM)
    rows: list[dict[str, Any]] = []
    figures = {"device": backend.device, "shape": args.shape, "spacing_mm": SPACING_MM, "runs": rows}
    for engine, name, recipe in ROWS:
        plan = make_plan(volume.geometry, recipe)
        row: dict[str, Any] = {"engine": engine, "recipe": name, "limit_hu": limit_hu(plan, engine)}
        try:
            row["largest_difference_hu"] = found = largest_difference_hu(volume, plan, backend, engine)
            row["agrees"] = found <= row["limit_hu"]  # False for NaN
            sign = "≤" if row["agrees"] else "but not ≤"
            result = f"largest difference {found:.3g} HU ({sign} {row['limit_hu']:g})"
        except BackendError as exc:  # without cuCIM, the engine ndimage does not run
            row["error"] = result = str(exc)
        rows.append(row)
        print(f"{engine:9} {name:14} {result}", flush=True)
        save(args.out, "bench.micro.parity", figures, gpu=args.backend == "gpu")
    return 0 if all(row.get("agrees", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
