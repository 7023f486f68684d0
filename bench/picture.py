"""Draw the README's picture: a phantom series as it is stored, and what becomes of it.

python -m bench.picture bench/results/before-after.png
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw

import gpuprep
from gpuprep.geometry import Geometry
from gpuprep.intensity import HuStatistics
from gpuprep.phantom import thorax
from gpuprep.volume import StoredVolume

SHAPE, SPACING_MM = (70, 512, 512), (4.5, 0.6816, 0.6816)
PANEL = 330


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    args = parser.parse_args()

    stored = thorax(SHAPE, SPACING_MM, seed=1)
    affine = np.diag([*SPACING_MM, 1.0])[[2, 1, 0, 3]]
    count = len(stored)
    source = StoredVolume(
        stored, np.ones(count), np.full(count, -1024.0), None, Geometry(SHAPE, affine), HuStatistics()
    )
    volume = np.asarray(gpuprep.process(source, gpuprep.Recipe(dtype="uint8"), backend="cpu"))
    raw = np.clip((stored.astype(np.float32) - 1024 + 3024) / 6100 * 255, 0, 255).astype(np.uint8)
    panels = [
        ("stored values, axial: 512 x 512", raw[35]),
        ("stored, coronal: 70 slices of 4.5 mm", raw[::-1, 250]),
        ("gpuprep, axial: 512 x 512, 1 mm apart", volume[157]),
        ("gpuprep, coronal: 315 slices of 1 mm", volume[::-1, 250]),
    ]
    sheet = Image.new("L", (PANEL * len(panels) + 8 * (len(panels) - 1), PANEL + 22), 255)
    draw = ImageDraw.Draw(sheet)
    for n, (title, pixels) in enumerate(panels):
        image = Image.fromarray(pixels)
        scale = PANEL / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
        sheet.paste(image, (n * (PANEL + 8), 22 + (PANEL - image.height) // 2))
        draw.text((n * (PANEL + 8) + 4, 5), title, fill=0)
    sheet.save(args.file, optimize=True)


if __name__ == "__main__":
    main()
