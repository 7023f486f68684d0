"""Draws the pictures of the documentation: conversion, gantry tilt, masks, ``gpuprep show`` and the report page.

    python -m bench.compare.picture bench/results

Chromium must be installed, for the screenshot of the report.
"""

import argparse
import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom import Dataset

import gpuprep
from gpuprep.cli.demo import write_cohort, write_outlines
from gpuprep.core.geometry import Geometry
from gpuprep.core.hounsfield import HuStatistics
from gpuprep.core.volume import StoredVolume
from gpuprep.report.html import write_report
from gpuprep.report.inspect_series import summarise_series
from gpuprep.report.montage import montage
from gpuprep.testing import outlines, thorax, write_series

SHAPE, SPACING_MM = (70, 512, 512), (4.5, 0.6816, 0.6816)
PANEL = 330
TILT_DEG = 15.0
CHROMIUM = shutil.which("chromium") or "chromium"
COLOURS = ((235, 70, 60), (70, 160, 255))


def conversion_panels() -> list[tuple[str, NDArray[Any]]]:
    """Return panels of a regular series: stored values and output."""
    stored = thorax(SHAPE, SPACING_MM, seed=1)
    affine = np.diag([*SPACING_MM, 1.0])[[2, 1, 0, 3]]
    count = len(stored)
    source = StoredVolume(
        stored, np.ones(count), np.full(count, -1024.0), None, Geometry(SHAPE, affine), HuStatistics()
    )
    volume = np.asarray(gpuprep.process(source, gpuprep.Recipe(dtype="uint8"), backend="cpu"))
    raw = np.clip((stored.astype(np.float32) - 1024 + 3024) / 6100 * 255, 0, 255).astype(np.uint8)
    return [
        ("stored values, axial: 512 x 512", raw[35]),
        ("stored, coronal: 70 slices of 4.5 mm", raw[::-1, 250]),
        ("gpuprep, axial: 512 x 512, 1 mm apart", volume[157]),
        ("gpuprep, coronal: 315 slices of 1 mm", volume[::-1, 250]),
    ]


def tilt_panels() -> list[tuple[str, NDArray[Any]]]:
    """Return sagittal panels of balls scanned with a tilted gantry and two missing slices, under both policies."""
    tilt = np.radians(TILT_DEG)
    table_mm, j, i = np.meshgrid(np.arange(60) * 3.0, np.arange(160) * 1.4, np.arange(48) * 1.4, indexing="ij")
    z, y, x = table_mm - j * np.sin(tilt), j * np.cos(tilt), i
    hu = np.random.default_rng(0).normal(-40, 15, z.shape)
    for centre_z, centre_y, radius_mm in ((70, 60, 40), (110, 150, 25), (30, 165, 30), (128, 95, 12), (0, 110, 18)):
        distance_mm = np.sqrt((z - centre_z) ** 2 + (y - centre_y) ** 2 + (x - 33) ** 2)
        hu += 300 * np.clip(radius_mm - distance_mm, 0, 1)
    stored = (hu + 1024).astype(np.int16)

    def set_position(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = ["0", "0", f"{k * 3:g}"]

    panels = []
    with tempfile.TemporaryDirectory() as folder:
        orientation = (1, 0, 0, 0, float(np.cos(tilt)), float(-np.sin(tilt)))
        files = write_series(Path(folder), stored, (3.0, 1.4, 1.4), orientation=orientation, change=set_position)
        for missing in (20, 41):
            files[missing].unlink()
        for policy, title in (("keep", "kept: as if upright"), ("fix", "fixed: shifted, gaps filled")):
            recipe = gpuprep.Recipe(policy=policy, size=None, dtype="uint8", spacing_mm=(1.4, 1.4, 1.4))  # type: ignore[arg-type]
            series = gpuprep.discover(folder, recipe.rules)[0]
            volume = np.asarray(gpuprep.process(gpuprep.read(series, recipe), recipe, backend="cpu"))
            panels.append((title, volume[::-1, :, 24]))
    return panels


def mask_panels() -> list[tuple[str, NDArray[Any]]]:
    """Return panels of a phantom with outlines as text, and of the label volume made from them, in colours."""
    spacing_mm = 3.0, 1.6, 1.6
    stored = thorax((60, 224, 224), spacing_mm, seed=1)
    organs = {name: found[8:52] for name, found in outlines(stored.shape, spacing_mm).items()}
    text = ["structure x_mm y_mm z_mm"]
    for name, found in organs.items():
        text += [f"{name} {x:.3f} {y:.3f} {z:.3f}" for points in found for x, y, z in points]
    with tempfile.TemporaryDirectory() as folder:
        dicom, file, out = (Path(folder) / name for name in ("dicom", "outlines.txt", "out"))
        write_series(dicom, stored, spacing_mm)
        file.write_text("\n".join(text))
        gpuprep.convert(dicom, out, gpuprep.Recipe(dtype="uint8", format="tif-stack"), masks=file, backend="cpu")
        image, labels = (tifffile.imread(next(out.rglob(f"{name}.tif"))) for name in ("volume", "labels"))
    return [
        ("outlines as text, on a slice of 3 mm", outlined(stored[30], [found[22] for found in organs.values()])),
        ("gpuprep: image and labels, axial", tinted(image[90], labels[90])),
        ("coronal: 180 slices of 1 mm", tinted(image[::-1, 236], labels[::-1, 236])),
        ("sagittal", tinted(image[::-1, :, 264], labels[::-1, :, 264])),
    ]


def show_picture() -> Image.Image:
    """Return the picture that ``gpuprep show --png`` draws of an output."""
    spacing_mm = 3.0, 1.6, 1.6
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # keeps its path out of the picture
        write_series(Path("dicom/patient-1"), thorax((60, 224, 224), spacing_mm, seed=1), spacing_mm)
        gpuprep.convert("dicom", "volumes", gpuprep.Recipe(format="tif-stack"), backend="cpu")
        return montage(summarise_series("volumes/dicom/patient-1"))


def save_report_picture(file: Path) -> None:
    """Save a screenshot of the report of the demo cohort with some more patients."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_cohort(Path("demo", "dicom"))
        write_outlines(Path("demo", "masks"))
        for seed in range(3, 7):
            shape, spacing_mm = (40 + 7 * seed, 192, 192), (2.5, 1.9, 1.9)
            write_series(Path("demo", "dicom", f"patient-{seed + 2}"), thorax(shape, spacing_mm, seed), spacing_mm)
        gpuprep.convert("demo/dicom", "out", gpuprep.Recipe(dtype="uint8"), masks="demo/masks", backend="cpu")
        page = Path(write_report("out")).absolute().as_uri()
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000")
        command = [CHROMIUM, *flags, "--window-size=1500,1030", f"--screenshot={folder}/shot.png", page]
        subprocess.run(command, check=True, capture_output=True)
        Image.open("shot.png").convert("RGB").quantize(128, Image.Quantize.FASTOCTREE).save(file, optimize=True)


def outlined(stored: NDArray[Any], contours: list[NDArray[Any]]) -> NDArray[Any]:
    """Return a slice in grey values with outlines drawn on it."""
    grey = np.clip((stored.astype(np.float32) - 1024 + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
    picture = Image.fromarray(grey).resize((896, 896)).convert("RGB")
    for points, colour in zip(contours, COLOURS, strict=False):
        on_picture = ((points[:, :2] - [-100, -120]) / 1.6 + 0.5) * 4
        ImageDraw.Draw(picture).line([tuple(p) for p in [*on_picture, on_picture[0]]], fill=colour, width=6)
    return np.asarray(picture)


def tinted(image: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """Return an image in grey values with its labels in colours."""
    picture = np.repeat(image[..., None], 3, axis=-1).astype(np.float32)
    for value, colour in enumerate(COLOURS, 1):
        picture[labels == value] = 0.45 * picture[labels == value] + 0.55 * np.array(colour)
    return picture.astype(np.uint8)


def draw(panels: list[tuple[str, NDArray[Any]]], file: Path) -> None:
    """Save panels side by side."""
    mode = "L" if all(pixels.ndim == 2 for _, pixels in panels) else "RGB"
    sheet = Image.new(mode, (PANEL * len(panels) + 8 * (len(panels) - 1), PANEL + 22), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (title, pixels) in enumerate(panels):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        scale = PANEL / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
        sheet.paste(image, (n * (PANEL + 8), 22 + (PANEL - image.height) // 2))
        pen.text((n * (PANEL + 8) + 4, 5), title, fill=0)
    sheet.save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    draw(conversion_panels(), folder / "before-after.png")
    draw(tilt_panels(), folder / "tilt.png")
    draw(mask_panels(), folder / "masks.png")
    show_picture().resize((816, 978)).quantize(128, Image.Quantize.FASTOCTREE).save(folder / "show.png", optimize=True)
    save_report_picture(folder / "report.png")


if __name__ == "__main__":
    main()
