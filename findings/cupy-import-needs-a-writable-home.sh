#!/usr/bin/env bash
# cupy-cuda12x==14.2.0: "import cupy" makes the folder of its kernel cache, on machines without a GPU too.
# So a program that only looks whether there is a GPU fails, or leaves a folder, before it compiles any kernel. Where HOME
# is not writable, as for service accounts, the error is no ImportError, which callers catch, but a NotADirectoryError or
# PermissionError. With CUPY_CACHE_DIR in a folder that can be written the import works.
# Output seen:
#   imported with an empty HOME, which then holds: .cupy .cupy/kernel_cache
#   HOME is a file: NotADirectoryError which is an ImportError: False
#   HOME is a file, CUPY_CACHE_DIR is set: imported
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q cupy-cuda12x==14.2.0
here=$(realpath "$0")
cd "$work"
mkdir home
touch file
try='
try:
    import cupy
    print("imported", end="")
except Exception as exc:
    print(type(exc).__name__, "which is an ImportError:", isinstance(exc, ImportError), end="")
'
{
    env -u CUPY_CACHE_DIR HOME="$work/home" venv/bin/python -c "$try"
    echo " with an empty HOME, which then holds: $(cd home && find . -mindepth 1 -printf '%P\n' | sort | paste -sd' ')"
    echo "HOME is a file: $(env -u CUPY_CACHE_DIR HOME="$work/file" venv/bin/python -c "$try")"
    echo "HOME is a file, CUPY_CACHE_DIR is set: $(HOME="$work/file" CUPY_CACHE_DIR="$work/cache" venv/bin/python -c "$try")"
} >seen
cat seen
sed -n "s/^#   //p" "$here" | diff - seen
