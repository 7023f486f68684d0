"""Draws the boxes of body and lungs on real CT: three planes through the middle of each box.

    python -m bench.micro.crop_montage DATA [--out docs/crop-boxes.jpg]

Each series below DATA that can be stacked and has at least 64 rows is drawn, at the true ratio of its spacings. The box
of the body is orange, that of the lungs blue; one that was not found is absent. DATA is `shared/data`; the attribution
that its licences require is written under the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gpuprep.compute.coarse_hu import coarse_hu
from gpuprep.compute.crop_box import FoundBox, find_box
from gpuprep.core.volume import StoredVolume
from gpuprep.dicom.discover import discover
from gpuprep.dicom.read import read
from gpuprep.errors import GpuprepError

WIDTH, HEIGHT, GAP = 1500, 170, 6
LOW_HU, HIGH_HU = -1050.0, 350.0
MIN_ROWS = 64
LONGEST_CASE = 8
"""Longest name of a subfolder that is shown."""
COLOURS = {"body": (255, 150, 40), "lungs": (80, 180, 255)}
BACKGROUND, FOREGROUND = (18, 20, 24), (232, 232, 228)
ATTRIBUTION = (
    "CT from The Cancer Imaging Archive, CC BY 3.0 and 4.0: LIDC-IDRI (Armato 2015), 4D-Lung (Hugo 2016), "
    "Soft-tissue-Sarcoma (Vallieres 2015), Lung-PET-CT-Dx (Li 2020).",
    "Phantoms: IBSI 2, CC BY 4.0. Further slices: test data of dcmqi (BSD), dicom2nifti (MIT), lungmask (Apache 2.0), "
    "rt-utils (MIT).",
)


def stacked(data: Path) -> Iterator[tuple[str, StoredVolume]]:
    """Yield the name and the stored values of every series that can be stacked."""
    for folder in sorted(f for f in data.iterdir() if f.is_dir()):
        for series in discover(folder):
            try:
                volume = read(series)
            except GpuprepError:
                continue
            if volume.geometry.shape[1] >= MIN_ROWS:
                case = next(iter(Path(series.folder).relative_to(folder).parts[1:]), "")
                yield f"{folder.name} {case}" if len(case) <= LONGEST_CASE else folder.name, volume


def planes(volume: StoredVolume, found: dict[str, FoundBox]) -> Iterator[Image.Image]:
    """Yield three planes of a series with its boxes."""
    hu = volume.stored * volume.slope[:, None, None] + volume.intercept[:, None, None]
    grey = np.clip((hu - LOW_HU) * 255 / (HIGH_HU - LOW_HU), 0, 255).astype(np.uint8)
    middle = found["lungs"].box or found["body"].box
    spacing_mm = volume.geometry.spacing_mm
    for axis in range(3):
        down, across = (n for n in range(3) if n != axis)
        index = hu.shape[axis] // 2 if middle is None else (middle.start[axis] + middle.stop[axis] - 1) // 2
        plane = grey.take(min(index, hu.shape[axis] - 1), axis)
        if plane.shape[0] < 6:
            continue
        scale = HEIGHT / (plane.shape[0] * spacing_mm[down])
        scale = min(scale, 1.6 * HEIGHT / (plane.shape[1] * spacing_mm[across]))
        size = [
            round(n * mm * scale) for n, mm in zip(plane.shape, (spacing_mm[down], spacing_mm[across]), strict=True)
        ]
        picture = Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.LANCZOS).convert("RGB")
        draw = ImageDraw.Draw(picture)
        ratio = [s / n for s, n in zip(size, plane.shape, strict=True)]
        for kind, colour in COLOURS.items():
            box = found[kind].box
            if box is not None and box.start[axis] <= index < box.stop[axis]:
                low = box.start[across] * ratio[1], box.start[down] * ratio[0]
                high = box.stop[across] * ratio[1] - 1, box.stop[down] * ratio[0] - 1
                draw.rectangle((*low, *high), outline=colour)
        if axis and volume.geometry.affine[2, 0] > 0:  # the head at the top
            picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        yield picture


def montage(tiles: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Return all series in rows, with their names, and the attribution below."""
    font = ImageFont.load_default(13)
    picture = Image.new("RGB", (WIDTH, 4000), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    x = y = GAP
    for name, pictures in tiles:
        width = max(sum(p.width + GAP for p in pictures), int(draw.textlength(name, font)) + GAP)
        if x > GAP and x + width > WIDTH:
            x, y = GAP, y + HEIGHT + 20 + 2 * GAP
        draw.text((x, y), name, FOREGROUND, font)
        for p in pictures:
            picture.paste(p, (x, y + 20))
            x += p.width + GAP
        x += 3 * GAP
    y += HEIGHT + 20 + 2 * GAP
    for line in ATTRIBUTION:
        draw.text((GAP, y), line, FOREGROUND, font)
        y += 20
    return picture.crop((0, 0, WIDTH, y + GAP))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/crop-boxes.jpg"))
    given = parser.parse_args()
    tiles = []
    for name, volume in stacked(given.data):
        coarse = coarse_hu(volume)
        found = {kind: find_box(volume, coarse, kind) for kind in ("body", "lungs")}
        tiles.append((name, list(planes(volume, found))))
        for kind, result in found.items():
            print(f"{name:18s} {kind:5s} {result.box}", *(f"\n    {w.code}: {w.text}" for w in result.warnings))
    montage(tiles).save(given.out, quality=80, optimize=True)
    print(f"{given.out}: {given.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
