#!/usr/bin/env bash
# cupy-cuda12x==14.2.0, cuda-pathfinder==1.9.1: CuPy for CUDA 12 compiles with NVRTC 13 if that is installed too.
# torch from 2.11 on requires NVRTC 13. CuPy finds NVRTC by cuda-pathfinder, which prefers 13 and knows no wanted version, and
# pip sees no conflict. Kernels are then binaries in the format of CUDA 13 (another ELF ABI), and on a driver for CUDA 12 the
# first one raises CUDADriverError (cupy#9827). GPUs of compute capability 7.0 are no longer supported.
# Output seen:
#   NVRTC 12.9.86 is installed: CuPy of CUDA 12.9 compiles with NVRTC 12.9; ELF ABI 7; compute capability 7.0: True
#   NVRTC 13.5.37 is installed too: CuPy of CUDA 12.9 compiles with NVRTC 13.5; ELF ABI 8; compute capability 7.0: False
#   pip check: No broken requirements found.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
here=$(realpath "$0")
cd "$work"
export CUPY_CACHE_DIR="$work/cache"
show='
import cupy
from cupy.cuda import nvrtc

runtime = cupy.cuda.runtime.runtimeGetVersion()
program = nvrtc.createProgram("__global__ void kernel() {}", "kernel.cu", (), ())
nvrtc.compileProgram(program, ("-arch=sm_80",))
print(f"CuPy of CUDA {runtime // 1000}.{runtime % 1000 // 10} compiles with NVRTC", "{}.{}".format(*nvrtc.getVersion()), end="; ")
print("ELF ABI", nvrtc.getCUBIN(program)[8], end="; compute capability 7.0: ")
print(70 in nvrtc.getSupportedArchs())
'
{
    venv/bin/pip install -q cupy-cuda12x==14.2.0 cuda-pathfinder==1.9.1 nvidia-cuda-nvrtc-cu12==12.9.86
    echo "NVRTC 12.9.86 is installed: $(venv/bin/python -c "$show")"
    venv/bin/pip install -q nvidia-cuda-nvrtc==13.5.37
    echo "NVRTC 13.5.37 is installed too: $(venv/bin/python -c "$show")"
    echo "pip check: $(venv/bin/pip check)"
} >seen
cat seen
sed -n "s/^#   //p" "$here" | diff - seen
