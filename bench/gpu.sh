#!/usr/bin/env bash
# Runs the GPU tests and benchmarks on a machine with an NVIDIA GPU, without network access.
#
#     bench/gpu.sh WHEELS_DIR [OUT_DIR]
#
# Needs python3 with CuPy, NumPy, SciPy, scikit-image, tifffile, typer and pytest. Other missing packages are installed
# from the wheels in WHEELS_DIR. To download these, on a machine with network access, for Python 3.12:
#
#     pip download --only-binary=:all: --no-deps --python-version 3.12 --platform manylinux_2_28_x86_64 -d WHEELS_DIR \
#         pydicom cucim-cu13 click lazy-loader rich filelock tomli-w array-api-compat threadpoolctl imagecodecs pyjpegls \
#         pylibjpeg pylibjpeg-openjpeg numba llvmlite psutil hypothesis sortedcontainers array-api-strict
#
# Results are written to OUT_DIR (bench/results): kernels-gpu.json, compare-gpu.json, and tests-gpu.txt (pytest output).
set -euo pipefail

wheels=$(cd "${1:?usage: bench/gpu.sh WHEELS_DIR [OUT_DIR]}" && pwd)
cd "$(dirname "$0")/.."
out=${2:-bench/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# Install missing packages only, and without dependencies, so that CuPy, NumPy etc. remain those of the machine.
for wheel in "$wheels"/*.whl; do
    [ -e "$wheel" ] || continue
    name=$(basename "$wheel" | cut -d- -f1)
    if ! python3 -c 'import sys, importlib.metadata as m; m.version(sys.argv[1])' "$name" 2>/dev/null; then
        python3 -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$site" "$wheel"
    fi
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$site"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || echo "no nvidia-smi"
python3 - <<'PYTHON'
import sys

from gpuprep.compute.backend import get_backend
from gpuprep.pipeline.convert_series import versions
from gpuprep.errors import BackendError

try:
    print(get_backend("gpu").device, flush=True)
except BackendError as exc:
    sys.exit(f"no GPU to run on: {exc}")
print(", ".join(f"{name} {version}" for name, version in versions(gpu=True).items()))
PYTHON

failed=0
# Select test files by name, so that packages of other tests are not needed. Other versions may raise other warnings.
tests=(tests/gpu/test_gpu.py tests/gpu/test_gpu_seam.py tests/compute/test_process.py tests/dicom/test_irregular.py)
python3 -m pytest -m gpu -W default -p no:cacheprovider "${tests[@]}" 2>&1 | tee "$out/tests-gpu.txt" || failed=1
python3 -m bench.micro.kernels --out "$out/kernels-gpu.json" || failed=1
python3 -m bench.compare --backend gpu --out "$out/compare-gpu.json" || failed=1
exit "$failed"
