#!/usr/bin/env bash
# scipy==1.17.1: ndimage.zoom with its default mode="constant" returns zeros in the last plane for some sizes.
# A constant volume of 100 is zoomed by 3 along its first axis; the last sample should be 100 for every length.
# For 50 samples it is 0: by a rounding error, the coordinate of the last output lies beyond the last input sample, and
# mode="constant" treats it as outside. mode="nearest" gives 100.
# Output seen:
#   50 -> 150: last three samples 100.0 100.0 0.0; with mode="nearest" 100.0 100.0 100.0
#   lengths from 20 to 400 that lose their last plane: 17, the first 29 50 101
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6 scipy==1.17.1
"$work/venv/bin/python" - >"$work/seen" <<'END'
import numpy as np
from scipy.ndimage import zoom


def last(n, count, **how):
    return zoom(np.full((n, 1, 1), 100.0), (3, 1, 1), order=1, **how)[-count:, 0, 0]


print("50 -> 150: last three samples", *last(50, 3), end="; ")
print('with mode="nearest"', *last(50, 3, mode="nearest"))
lost = [n for n in range(20, 401) if last(n, 1)[0] == 0]
print(f"lengths from 20 to 400 that lose their last plane: {len(lost)}, the first", *lost[:3])
END
cat "$work/seen"
sed -n 's/^#   //p' "$0" | diff - "$work/seen"
