"""Time to read a large structure set, compared with pydicom.

    python -m bench.micro.structure_set [--out bench/results/structure-set-….json]

The file has 40 ROIs of 200 contours of 600 points with two decimals, 96 MB, or with ``--contours 1200 --points 80
--decimals 4`` more contours of fewer points. It is written with sequences of defined length and with ones of undefined
length. "pydicom" is the least that a program has to do with it: it takes the items from pydicom, and calls `float` for
each coordinate. Both read the same file in turn in one process; medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from bench.measure import save
from gpuprep.masks.read import read_segmentation

UNDEFINED = 0xFFFF_FFFF
LONG_VRS = ("SQ", "UN", "OB", "UT")
PATTERNS = 64
"""Number of different contours."""


def element(tag: int, vr: str, value: bytes, *, explicit: bool = True, undefined: bool = False) -> bytes:
    """Return an element in little endian; values of odd length are padded."""
    value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    length = UNDEFINED if undefined else len(value)
    if undefined:
        value += pack("<HHL", 0xFFFE, 0xE0DD, 0)
    head = pack("<HH", tag >> 16, tag & 0xFFFF)
    if not explicit:
        return head + pack("<L", length) + value
    if len(value) > 0xFFFF and vr not in LONG_VRS:
        vr = "UN"  # PS3.5, 6.2.2
    if vr in LONG_VRS:
        return head + vr.encode() + pack("<HL", 0, length) + value
    return head + vr.encode() + pack("<H", length) + value


def item(content: bytes, *, undefined: bool = False) -> bytes:
    """Return an item of a sequence."""
    if undefined:
        return pack("<HHL", 0xFFFE, 0xE000, UNDEFINED) + content + pack("<HHL", 0xFFFE, 0xE00D, 0)
    return pack("<HHL", 0xFFFE, 0xE000, len(content)) + content


def structure_set(rois: int, contours: int, points: int, decimals: int, *, undefined: bool) -> bytes:
    """Return a file with circles of random size on 64 planes."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    data = []
    for n in range(PATTERNS):
        circle = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
        placed = np.append(rng.uniform(-100, 100, 2), 3 * n - 96) + circle * rng.uniform(20, 150)
        data.append("\\".join(f"{v:.{decimals}f}" for v in placed.ravel()).encode())

    def sequence(tag: int, contents: list[bytes]) -> bytes:
        return element(tag, "SQ", b"".join(item(c, undefined=undefined) for c in contents), undefined=undefined)

    def contour(n: int) -> bytes:
        image = element(0x0008_1150, "UI", b"1.2.840.10008.5.1.4.1.1.2")
        image += element(0x0008_1155, "UI", f"1.2.826.0.1.3680043.8.498.{n % PATTERNS:030d}".encode())
        return (
            sequence(0x3006_0016, [image])
            + element(0x3006_0042, "CS", b"CLOSED_PLANAR")
            + element(0x3006_0046, "IS", str(points).encode())
            + element(0x3006_0048, "IS", str(n).encode())
            + element(0x3006_0050, "DS", data[n % PATTERNS])
        )

    outlines = sequence(0x3006_0040, [contour(n) for n in range(contours)])
    numbers = [str(n).encode() for n in range(1, rois + 1)]
    described = [element(0x3006_0022, "IS", n) + element(0x3006_0026, "LO", b"ROI " + n) for n in numbers]
    outlined = [outlines + element(0x3006_0084, "IS", n) for n in numbers]
    return (
        bytes(128)
        + b"DICM"
        + element(0x0002_0010, "UI", pydicom.uid.ExplicitVRLittleEndian.encode())
        + element(0x0008_0016, "UI", pydicom.uid.RTStructureSetStorage.encode())
        + sequence(0x3006_0020, described)
        + sequence(0x3006_0039, outlined)
    )


def with_pydicom(path: Path) -> list[NDArray[np.float64]]:
    """Return the coordinates of all contours."""
    found = []
    for roi in pydicom.dcmread(path).ROIContourSequence:
        for contour in roi.ContourSequence:
            parts = contour.get_item("ContourData").value.split(b"\\")
            found.append(np.fromiter(map(float, parts), np.float64, len(parts)))
    return found


def with_gpuprep(path: Path) -> list[NDArray[np.float64]]:
    """Return the coordinates of all contours."""
    return [c.points.ravel() for s in read_segmentation(path).structures for c in s.contours]


def timed(function: Callable[[Path], Any], path: Path) -> float:
    started = time.perf_counter()
    function(path)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rois", type=int, default=40)
    parser.add_argument("--contours", type=int, default=200, help="contours of each ROI")
    parser.add_argument("--points", type=int, default=600, help="points of each contour")
    parser.add_argument("--decimals", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "out"}
    with tempfile.TemporaryDirectory() as folder:
        for undefined in (False, True):
            path = Path(folder) / "rs.dcm"
            path.write_bytes(structure_set(args.rois, args.contours, args.points, args.decimals, undefined=undefined))
            for ours, theirs in zip(with_gpuprep(path), with_pydicom(path), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            taken = [(timed(with_gpuprep, path), timed(with_pydicom, path)) for _ in range(args.rounds)]
            ours_s, theirs_s = map(statistics.median, zip(*taken, strict=True))
            length = "undefined" if undefined else "defined"
            print(f"{length} lengths: gpuprep {ours_s:.2f} s, pydicom {theirs_s:.2f} s: {theirs_s / ours_s:.1f} times")
            figures[length] = {"mb": path.stat().st_size / 1e6, "gpuprep_s": ours_s, "pydicom_s": theirs_s}
    save(args.out, "bench.micro.structure_set", figures)


if __name__ == "__main__":
    main()
