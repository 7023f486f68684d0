#!/usr/bin/env bash
# GPU tests and benchmarks in one command, on a machine with an NVIDIA GPU, without a network.
#
#     bench/gpu.sh WHEELS_DIR [OUT_DIR]
#
# Needs python3 with CuPy, NumPy, SciPy, scikit-image, tifffile, typer and pytest. What else gpuprep and its tests import
# is taken from WHEELS_DIR, as far as it is there and python3 lacks it. To fill it, on a machine with a network and the
# same Python version, here 3.12:
#
#     pip download --only-binary=:all: --no-deps --python-version 3.12 --platform manylinux_2_28_x86_64 -d WHEELS_DIR \
#         pydicom cucim-cu13 click lazy-loader rich filelock tomli-w array-api-compat threadpoolctl imagecodecs pyjpegls \
#         pylibjpeg pylibjpeg-openjpeg numba llvmlite psutil hypothesis sortedcontainers array-api-strict
#
# Figures go to OUT_DIR (bench/results) as kernels-gpu.json and compare-gpu.json, what the tests said as tests-gpu.txt.
set -euo pipefail

wheels=$(cd "${1:?usage: bench/gpu.sh WHEELS_DIR [OUT_DIR]}" && pwd)
cd "$(dirname "$0")/.."
out=${2:-bench/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# Only what is missing, and without dependencies: CuPy, NumPy and their like stay those of the machine.
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
# By name, so that nothing is imported that only other tests need; other versions may warn of other things.
tests=(tests/gpu/test_gpu.py tests/gpu/test_gpu_seam.py tests/compute/test_process.py tests/dicom/test_irregular.py)
python3 -m pytest -m gpu -W default -p no:cacheprovider "${tests[@]}" 2>&1 | tee "$out/tests-gpu.txt" || failed=1
python3 -m bench.micro.kernels --out "$out/kernels-gpu.json" || failed=1
python3 -m bench.compare --backend gpu --out "$out/compare-gpu.json" || failed=1
exit "$failed"
