#!/usr/bin/env bash
# Checks and measures a machine with an NVIDIA GPU in at most ten minutes, without network access.
#
#     bench/gpu.sh [WHEELS_DIR|- [OUT_DIR]]
#
# Needs python3 with CuPy, NumPy, SciPy, scikit-image, tifffile, typer and pytest. Other missing packages are installed
# from the wheels in WHEELS_DIR; with - or nothing, all packages are there. To download wheels, on a machine with network
# access, for Python 3.12:
#
#     pip download --only-binary=:all: --no-deps --python-version 3.12 --platform manylinux_2_28_x86_64 -d WHEELS_DIR \
#         pydicom cucim-cu13 click lazy-loader rich filelock tomli-w array-api-compat threadpoolctl imagecodecs pyjpegls \
#         pylibjpeg pylibjpeg-openjpeg numba llvmlite psutil hypothesis sortedcontainers array-api-strict SimpleITK
#
# The parts run one after the other, the most valuable ones first. Each has a time limit, and a part that fails does not
# stop the next ones. A part NAME writes its output to OUT_DIR/NAME-gpu.txt and its figures to OUT_DIR/NAME-gpu.json
# (OUT_DIR: bench/results). Last comes a summary; the exit code is 1 if a part failed.
set -uo pipefail

TOTAL_S=590
usage="usage: bench/gpu.sh [WHEELS_DIR|- [OUT_DIR]]"
[ "$#" -le 2 ] || { echo "$usage" >&2; exit 2; }
wheels=${1:--}
if [ "$wheels" != - ]; then
    wheels=$(cd "$wheels" && pwd) || { echo "$usage" >&2; exit 2; }
fi
cd "$(dirname "$0")/.." || exit 2
out=${2:-bench/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$site"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

install_missing() {
    # Missing packages only, and without dependencies, so that CuPy, NumPy etc. remain those of the machine.
    local wheel name missing=()
    for wheel in "$wheels"/*.whl; do
        [ -e "$wheel" ] || continue
        name=$(basename "$wheel" | cut -d- -f1)
        python3 -c 'import sys, importlib.metadata as m; m.version(sys.argv[1])' "$name" 2>/dev/null || missing+=("$wheel")
    done
    [ "${#missing[@]}" -eq 0 ] && return
    python3 -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$site" "${missing[@]}"
}

need_gpu() {
    python3 -c '
import sys
from gpuprep.compute.backend import get_backend
from gpuprep.errors import BackendError
try:
    get_backend("gpu")
except BackendError as exc:
    print(f"not run, because no GPU can be used: {exc}")
    sys.exit(exc.exit_code)'
}

doctor() { python3 -m gpuprep doctor --gpu --json >"$out/doctor-gpu.json"; }

tests() {
    # Test files are selected by name, so that packages of other tests are not needed. Other versions of packages may
    # raise other warnings. Without a GPU, the tests would use a simulated one.
    local files=(tests/gpu/test_gpu.py tests/gpu/test_gpu_seam.py tests/compute/test_process.py tests/dicom/test_irregular.py)
    need_gpu && python3 -m pytest -q -m gpu -W default -p no:cacheprovider "${files[@]}"
}

parity() { python3 -m bench.micro.parity --out "$out/parity-gpu.json"; }

kernels() { python3 -m bench.micro.kernels --out "$out/kernels-gpu.json"; }

workers() { python3 -m bench.scale.workers --out "$out/workers-gpu.json"; }

compare() {
    need_gpu && python3 -m bench.compare --backend gpu --minutes 1 --out "$out/compare-gpu.json" --only \
        "gpuprep, uint8" "gpuprep, float32" "gpuprep, GPU, uint8" "gpuprep, GPU, float32" "*CUDA*" "SimpleITK, linear*"
}

summary=()
failed=0

note() {
    summary+=("$1")
    [ "$2" -eq 0 ] || failed=1
}

run_part() {
    local name=$1 limit_s=$2 left_s=$((TOTAL_S - SECONDS)) started=$SECONDS code took
    [ "$limit_s" -lt "$left_s" ] || limit_s=$left_s
    if [ "$limit_s" -lt 5 ]; then
        note "$name: not started: no time left" 1
        return
    fi
    echo "== $name (at most $limit_s s)"
    # A process group of its own, so that worker processes end with the part.
    export -f "$name" need_gpu
    export out
    timeout --kill-after=5 "$limit_s" bash -c "$name" 2>&1 | tee "$out/$name-gpu.txt"
    code=${PIPESTATUS[0]}
    took=$((SECONDS - started))
    case $code in
        0) note "$name: done in $took s" 0 ;;
        124 | 137) note "$name: stopped after $took s of at most $limit_s; figures until then are kept" 1 ;;
        *) note "$name: failed with exit code $code in $took s: $(tail -n 1 "$out/$name-gpu.txt")" 1 ;;
    esac
}

if [ "$wheels" != - ]; then
    install_missing || note "wheels: not all were installed" 1
fi
timeout 20 nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"

run_part doctor 100
run_part tests 170
run_part parity 90
run_part kernels 70
run_part workers 110
run_part compare 110

echo "== summary: figures in $out"
printf '%s\n' "${summary[@]}"
exit "$failed"
