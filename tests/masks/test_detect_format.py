"""Detecting and reading segmentation texts that consist of lines of numbers, and refusing other files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuprep.core.mask_options import TEXT_FORMATS, ReadingOptions
from gpuprep.dicom.uids import SEGMENTATION_CLASSES
from gpuprep.errors import SegmentationError
from gpuprep.masks.detect_format import TEXTS, recognise
from gpuprep.masks.filename_hints import slice_and_structure
from gpuprep.masks.formats.dicom_objects import OBJECTS
from gpuprep.masks.formats.number_tables import TABLES
from gpuprep.masks.formats.parse_numbers import parse
from gpuprep.masks.model import Plane, Raster, Segmentation, SliceKey
from gpuprep.masks.rasterize import filled
from gpuprep.masks.read import read_segmentation
from gpuprep.masks.text_parsing import NUMBER

Open = Callable[..., Segmentation]

PLANE = Plane(512, 512, (0.703125, 0.703125))
SQUARE = "10\t20\n30\t20\n30\t40\n10\t40\n"
XYZ = "".join(f"{x} {y} {z}\n" for z in (3, 4) for x, y in ((1, 2), (9, 2), (9, 8), (1, 8)))
"""A rectangle on slice 3, and on slice 4."""


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Return a function that writes a text or bytes to a file and reads it."""

    def opened(
        text: str | bytes, plane: Plane | None = None, name: str = "liver_012.txt", **reading: Any
    ) -> Segmentation:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_segmentation(tmp_path / name, ReadingOptions(**reading), plane)

    return opened


def refusal(opened: Open, text: str | bytes, *args: Any, **reading: Any) -> str:
    with pytest.raises(SegmentationError) as caught:
        opened(text, *args, **reading)
    message = str(caught.value)
    assert message
    assert message.isprintable()  # one line
    assert len(message) < 250
    return message


def outcome(opened: Open, text: str | bytes, *args: Any, **reading: Any) -> Segmentation | str:
    """Return the segmentation, or the message of the error."""
    try:
        return opened(text, *args, **reading)
    except SegmentationError as exc:
        return str(exc)


def placed(raster: Raster, shape: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, dtype=bool)
    rows, columns = raster.mask.shape
    mask[raster.row : raster.row + rows, raster.column : raster.column + columns] = raster.mask
    return mask


# Real files of ImageJ 1.53t.


@pytest.fixture
def imagej(data: Path) -> Path:
    return data / "txt-formats" / "imagej"


def test_every_format_has_a_name_for_text_format() -> None:
    assert (*TABLES, *TEXTS) == TEXT_FORMATS


def test_every_segmentation_class_of_dicom_has_a_format() -> None:
    assert tuple(OBJECTS) == SEGMENTATION_CLASSES


@pytest.fixture
def truth(imagej: Path) -> NDArray[np.bool_]:
    mask = np.asarray(tifffile.imread(imagej / "lidc0001_z-125_mask_imagej_fill.tif")) > 0
    assert mask.sum() == 418
    return mask


@pytest.mark.parametrize(("file", "frame"), [("uncalibrated_px", "pixel"), ("calibrated_mm", "corner")])
def test_outlines_of_imagej_fill_as_imagej_fills_them(
    imagej: Path, truth: NDArray[np.bool_], file: str, frame: str
) -> None:
    found = read_segmentation(imagej / f"lidc0001_z-125_xy_{file}.txt", plane=PLANE)
    (structure,) = found.structures
    (contour,) = structure.contours
    assert (structure.name, contour.slice) == (f"lidc0001_xy_{file}", SliceKey("z", -125.0))
    assert (contour.frame, len(contour.points), found.per_slice) == (frame, 76, True)
    # ImageJ's outlines follow pixel corners; mm are written with four decimals, so they are rounded to corners here.
    points = contour.points if frame == "pixel" else np.rint(contour.points / 0.703125) - 0.5
    assert np.array_equal(filled([points], (512, 512)), truth)


def test_an_outline_between_pixels_fills_as_imagej_fills_it(imagej: Path) -> None:
    found = read_segmentation(imagej / "lidc0001_z-125_xy_subpixel_px.txt", ReadingOptions(units="px"))
    assert filled([found.structures[0].contours[0].points], (512, 512)).sum() == 415


@pytest.mark.parametrize("file", ["xy_subpixel_px", "xy_calibrated_mm"])
def test_decimals_of_imagej_need_units_if_the_series_is_unknown(imagej: Path, file: str) -> None:
    with pytest.raises(SegmentationError, match="--units"):
        read_segmentation(imagej / f"lidc0001_z-125_{file}.txt")


def test_text_image_of_imagej_is_its_mask(imagej: Path, truth: NDArray[np.bool_]) -> None:
    found = read_segmentation(imagej / "lidc0001_z-125_mask_textimage.txt")
    (raster,) = found.structures[0].rasters
    assert (raster.matrix, raster.slice) == ((512, 512), SliceKey("z", -125.0))
    assert np.array_equal(placed(raster, (512, 512)), truth)


@pytest.mark.parametrize("plane", [None, PLANE, Plane(8, 12, (1.0, 1.0))])
def test_a_text_image_of_hu_is_refused(imagej: Path, plane: Plane | None) -> None:
    with pytest.raises(SegmentationError, match="an image, not a mask"):
        read_segmentation(imagej / "lidc0001_z-125_crop300_350_12x8_HU_textimage.txt", plane=plane)


# Round trips.

whole = st.integers(0, 511)
outlines = st.lists(st.tuples(whole, whole), min_size=3, max_size=30, unique=True)
"""Outlines of distinct points, so that no outline closes before its last point."""
separators = st.sampled_from([" ", "\t", ",", ";", ", ", "  "])
line_ends = st.sampled_from(["\n", "\r\n", "\r"])
reused = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@reused
@given(outlines, separators, line_ends, st.sampled_from(["", "\ufeff", "# a comment\n", "\n\n", "x,y\n", "// note\n"]))
def test_outlines_are_read_back(
    opened: Open, outline: list[tuple[int, int]], between: str, end: str, before: str
) -> None:
    text = (before + "".join(f"{x}{between}{y}  \n" for x, y in outline)).replace("\n", end)
    (structure,) = opened(text, text_format="imagej-xy").structures  # some outlines resemble a list of pixels
    (contour,) = structure.contours
    assert (contour.points + 0.5).tolist() == [list(p) for p in outline]
    assert (structure.name, contour.frame, contour.slice) == ("liver", "pixel", SliceKey("number", 12))


@reused
@given(st.lists(outlines, min_size=1, max_size=5), separators, st.sampled_from(["contour", "slice", "object"]))
def test_points_with_a_header_are_read_back(
    opened: Open, polygons: list[list[tuple[int, int]]], between: str, column: str
) -> None:
    header = between.join([column, "y", "x"] if column == "slice" else ["slice", column, "y", "x"])
    own = "" if column == "slice" else f"7{between}"
    rows = [f"{own}{n}{between}{y}{between}{x}" for n, polygon in enumerate(polygons) for x, y in polygon]
    found = opened("\n".join([header, *rows]), text_format="points")
    contours = [c for s in found.structures for c in s.contours]
    assert [c.points.tolist() for c in contours] == [[list(p) for p in polygon] for polygon in polygons]
    numbers = range(len(polygons)) if column == "slice" else [7] * len(polygons)
    assert [c.slice for c in contours] == [SliceKey("number", n) for n in numbers]
    assert len(found.structures) == (len(polygons) if column == "object" else 1)
    assert not found.per_slice


@reused
@given(st.lists(outlines, min_size=1, max_size=5), separators, st.sampled_from(["", "3", "tumour", '"left lung"']))
def test_polygons_are_read_back(opened: Open, polygons: list[list[tuple[int, int]]], between: str, label: str) -> None:
    lines = [between.join(([label] if label else []) + [str(v) for p in polygon for v in p]) for polygon in polygons]
    (structure,) = opened("\n".join(lines), text_format="polygons").structures
    assert [c.points.tolist() for c in structure.contours] == [[list(p) for p in polygon] for polygon in polygons]
    assert structure.name == (label.strip('"') or "liver")


@reused
@given(st.integers(0, 2**32), st.integers(6, 40), st.integers(2, 40), separators, st.sampled_from(["{}", "{}.000"]))
def test_text_images_are_read_back(opened: Open, seed: int, columns: int, rows: int, between: str, style: str) -> None:
    labels = np.random.default_rng(seed).integers(0, 4, (rows, columns))
    text = "\n".join(between.join(style.format(v) for v in row) for row in labels.tolist())
    found = opened(text, Plane(rows, columns, (1.0, 1.0)))
    assert found.format == "ImageJ text image"
    values = np.unique(labels[labels > 0]).tolist()
    names = ["liver"] if values == [1] else [str(v) for v in values]
    assert [s.name for s in found.structures] == names
    for value, structure in zip(values, found.structures, strict=True):
        assert np.array_equal(placed(structure.rasters[0], labels.shape), labels == value)
        assert structure.rasters[0].matrix == (rows, columns)


@reused
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0, 1]))
def test_pixel_lists_are_read_back(opened: Open, seed: int, stack: bool, base: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 3, (2 if stack else 1, 5, 7))
    assume(len(np.unique(labels)) == 3)
    pixels = [
        " ".join(str(n + base) for n in ((x, y, z) if stack else (x, y))) + f" {labels[z, y, x]}"
        for z, y, x in np.argwhere(labels).tolist()
    ]
    found = opened("\n".join(pixels), text_format="imagej-values", pixel_base=base)
    read = np.zeros_like(labels)
    for structure in found.structures:
        for raster in structure.rasters:
            assert raster.matrix is None
            key = raster.slice
            assert key is not None
            z = int(float(key.value)) - base if stack else 0
            read[z][placed(raster, (5, 7))] = int(structure.name)
    assert np.array_equal(read, labels)
    assert found.per_slice != stack


# Recognition.


@pytest.mark.parametrize(
    ("text", "format_", "frame", "slices"),
    [
        (SQUARE, "imagej-xy", "pixel", [12.0]),
        (XYZ, "points", "pixel", [3.0, 4.0]),
        (re.sub(r"(\d+) (\d+) (\d+)", r"\3 \1 \2", XYZ), "points", "pixel", [3.0, 4.0]),
        (re.sub(r"(\d+) (\d+) (\d+)", r"\3;\1.5;\2.25", XYZ), "points", "pixel", [3.0, 4.0]),
        (re.sub(r"(?m)^", "5 ", XYZ), "points", "pixel", [3.0, 4.0]),
        (re.sub(r"(?m)^(?=.)", "2 5 ", XYZ), "points", "pixel", [3.0, 4.0]),
        (re.sub(r"(\d+) (\d+) (\d+)", r"-\1.5 \2.5 -12\3.25", XYZ), "points", "patient", [None, None]),
        ("x_mm,y_mm,z_mm\n" + XYZ.replace(" ", ","), "points", "patient", [None, None]),
        ("1 2 3 4 5 7\n1 2 3 4 5 7 8 11\n", "polygons", "pixel", [12.0, 12.0]),
        ("a 1 2 3 4 5 7\na 1 2 3 4 5 8\n", "polygons", "pixel", [12.0, 12.0]),
    ],
)  # fmt: skip
def test_the_format_of_a_table_of_numbers_is_recognised(
    opened: Open, text: str, format_: str, frame: str, slices: list[float | None]
) -> None:
    text = "\n".join(line for line in text.split("\n") if len(line.split()) != 1 or "," in line or ";" in line)
    assert recognise(text, "a", ReadingOptions(), None).format == format_
    found = opened(text)
    contours = [c for s in found.structures for c in s.contours]
    assert [c.frame for c in contours] == [frame] * len(slices)
    assert [c.slice.value if c.slice else None for c in contours] == slices


def test_a_list_of_pixels_is_not_taken_for_points(opened: Open) -> None:
    pixels = "".join(f"{x}\t{y}\t255\n" for y in range(4, 7) for x in range(3, 9))
    found = opened(pixels)
    assert (found.format, found.structures[0].name) == ("ImageJ pixel list", "liver")
    (raster,) = found.structures[0].rasters
    assert (raster.row, raster.column) == (4, 3)
    assert raster.mask.tolist() == [[True] * 6] * 3


@pytest.mark.parametrize("columns", ["xy", "yx", "xyz", "zyx", "zxy", "yxv", "zyxv", "yxz"])
def test_a_list_of_pixels_is_never_an_outline(opened: Open, columns: str) -> None:
    """Pixels as `numpy.argwhere` lists them, with columns in any order, in rows of 1 to 5 pixels."""
    rows = [(4, 6, 7), (5, 5, 8), (6, 4, 9), (7, 6, 7)]
    slices = (2, 3) if "z" in columns else (2,)
    pixels = [{"x": x, "y": y, "z": z, "v": 1} for z in slices for y, *ends in rows for x in range(*ends)]
    text = "".join(" ".join(str(p[c]) for c in columns) + "\n" for p in pixels)
    assert refusal(opened, text).startswith("lists the pixels of an area, not an outline")
    (structure,) = opened("y x value\n4 3 1\n4 4 1\n5 3 1\n", text_format="imagej-values").structures
    assert structure.rasters[0].mask.tolist() == [[True, True], [True, False]]


def test_all_pixels_of_a_list_of_intensities_are_the_mask(opened: Open) -> None:
    values = "".join(f"{x},{y},{-900 + 31 * x - 7 * y}\n" for y in range(4, 7) for x in range(3, 9))
    found = opened(values, text_format="imagej-values")
    assert found.structures[0].rasters[0].mask.sum() == 18
    assert "intensities" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "plane", "message"),
    [
        ("1.5 2.5\n3.5 4.5\n1.5 4.5\n", None, "--units px or --units mm"),
        ("1.5 2.5\n3.5 4.5\n1.5 4.5\n", Plane(9, 9, (0.5, 0.5)), "--units px or --units mm"),  # halves: both
        ("900.5 2.5\n3.5 4.5\n1.5 4.5\n", Plane(9, 9, (0.7, 0.7)), "neither"),
        ("1.5 2.5 3\n3.5 4.5 3\n1.5 4.5 3\n", None, "--units"),
        ("1 2 -3.5\n3 4 -3.5\n1 4 -3.5\n", None, "--slice-from z"),
        ("1 2 3\n4 5 6\n7 8 1\n", None, "--text-format"),
        ("3 5 3\n3 6 3\n3 7 3\n", None, "slice x y"),
        ("1 2 3 4 5 6\n2 3 4 5 6 7\n", None, "--text-format imagej-text-image or polygons"),
    ],
)
def test_ambiguous_text_is_refused_with_the_option_that_decides(
    opened: Open, text: str, plane: Plane | None, message: str
) -> None:
    assert message in refusal(opened, text, plane)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('####\n# ITK-SnAP Label Description File\n#\n    0     0    0    0        0  0  0    "Clear"\n', "ITK-SNAP"),
        ("0 0 0 0 0 0 0 \"Clear Label\"\n1 255 0 0 1 1 1 \"Liver\"\n", "ITK-SNAP"),
        ("<annotation><object><bndbox><xmin>3</xmin></bndbox></object></annotation>", "boxes"),
        ("# R A S\n#lesion\n1 2 3\n", "Xinapse Jim"),
        ("1 2 3\n..m..\n4 5 6\n", "3dm"),
        ('{"type": "FeatureCollection"}', "JSON"),
        ("[[1, 2], [3, 4]]", "JSON"),
        ("ObjectType = Image\nNDims = 3\n", "MetaImage"),
        ("0 0.5 0.5 0.1 0.2\n1 0.25 0.5 0.1 0.2\n", "YOLO"),
        ("10 20 30 40\n50 60 70 80\n", "boxes"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.9\n1 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9\n", "confidence"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"PK\x03\x04abcd", "RoiSet"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"Iout\0\xdf", "ImageJ .roi"),
        (b"NRRD0004\ntype: short\n", "NRRD"),
        (b"\x5c\x01\0\0" + bytes(344), "NIfTI"),
        (b"1 2\n3 \x01\n", "binary: character 0x01 in line 2"),
        ("1,5 2,5\n3,5 4,5\n", "line 1, column 2: a comma between digits"),
        ("1\n2\n3\n", "one number in every line"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_name(opened: Open, text: str | bytes, message: str) -> None:
    assert message in refusal(opened, text)


def test_a_header_of_boxes_is_refused(opened: Open) -> None:
    assert "boxes" in refusal(opened, "xmin,ymin,xmax,ymax\n1,2,3,4\n")


def test_prose_is_refused_and_not_shown(opened: Open) -> None:
    message = refusal(opened, "Patient: Jane Roe, born 1950\n1 2\n3 4\n5 5\n")
    assert "no known kind" in message
    assert "Jane" not in message


# Damage.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SQUARE.replace("30\t40", "30\tx40"), "line 3, column 4: a word is no number"),
        (SQUARE.replace("30\t40", "nan 40"), "line 3, column 1: 'nan' is no number"),
        (SQUARE.replace("30\t40", "30 -inf"), "line 3, column 4: '-inf' is no number"),
        (SQUARE.replace("30\t40", "1e400 40"), "line 3, column 1: '1e400' is beyond"),
        (SQUARE.replace("30\t40", "30 2e6"), "line 3, column 4: '2e6' is beyond"),
        (SQUARE.replace("30\t40", "3_0 40"), "line 3, column 1: '3_0' is no number"),
        (SQUARE.replace("30\t40", "30 4.0.1"), "line 3, column 4: '4.0.1' is no number"),
        (SQUARE.replace("30\t40", "30 4-1"), "line 3, column 4: '4-1' is no number"),
        (SQUARE.replace("30\t40", "30 0x10"), "line 3, column 4: '0x10' is no number"),
        (SQUARE.replace("30\t40", "30"), "line 3: 1 number, where line 1 has 2"),
        (SQUARE.replace("30\t40", "30 40 50"), "line 3: 3 numbers, where line 1 has 2"),
        (SQUARE.replace("30\t40", "30,,40"), "line 3, column 4: nothing before the ','"),
        ("10 20\n30 20\n", "takes at least 3 points"),
        (XYZ.replace("9 8 4", "9 8 l4"), "line 7, column 5: 'l4' is no number"),
        (XYZ.replace("9 8 4", "9 8"), "line 7: 2 numbers, where line 1 has 3"),
        ("1 2 3 4 5 6\n1 2 3 4 5 6 7\n", "line 2: 7 numbers"),
        ("7 1 2 3 4 5 6\n7 1 2 3 4 5 6 7 8\n7 1 2 3 4 5\n", "line 3: 6 numbers"),
        ("1 2 3 4 5 6\n\n1 2 3 4 5 6 7 8 1e99\n", "line 3, column 17: '1e99' is beyond"),
        ("0 0 0 0 0 0 0\n0 0 1 1 0 0 0\n0 0 1 1 0 0\n", "line 3: 6 numbers, where line 1 has 7"),
        ("0 0 0 0 0 0 0\n0 0 1 l 0 0 0\n", "line 2, column 7: 'l' is no number"),
        ("1 1 5\n2 1 5\n3 1 five\n", "line 3, column 5: a word is no number"),
        ("", "is empty"),
        (b"", "is empty"),
        ("\ufeff\r\n \t\r\n", "is empty"),
    ],
)
def test_damage_is_refused_with_line_and_column(opened: Open, text: str | bytes, message: str) -> None:
    assert message in refusal(opened, text)


@pytest.mark.parametrize("key", TABLES)
@pytest.mark.parametrize("bad", ["nan", "inf", "-Infinity", "1e999", "1_0", "٣"])
def test_every_format_refuses_words_that_are_no_decimal_number(opened: Open, key: str, bad: str) -> None:
    good = {"imagej-xy": "1 2", "points": "3 1 2", "imagej-values": "3 1 2"}.get(key, "1 2 3 4 5 6")
    text = "\n".join([good] * 4 + [good[:-1] + bad])
    assert f"line 5, column {len(good)}: '{bad}" in refusal(opened, text, text_format=key)


@pytest.mark.parametrize("key", TABLES)
def test_a_line_of_megabytes_is_read_or_refused(opened: Open, key: str) -> None:
    text = "1 2 3 4 " * 250_000
    if key == "polygons":
        (contour,) = opened(text, text_format=key).structures[0].contours
        assert contour.points.shape == (500_000, 2)
    else:
        assert refusal(opened, text, text_format=key)
    assert "line 1, column 2000001: '!' is no number" in refusal(opened, text + "!", text_format=key)
    assert "beyond" in refusal(opened, "7" * 2_000_000 + " 1", text_format=key)


@reused
@given(st.one_of(st.text(alphabet=" 0123456789.,;-+eE\n\t#", max_size=80), st.text(alphabet=" 01.\n", max_size=80)))
def test_arbitrary_numbers_are_read_or_refused(opened: Open, text: str) -> None:
    for key in (None, *TABLES):
        for plane in (None, Plane(3, 6, (0.5, 0.5))):
            found = outcome(opened, "1" + text, plane, text_format=key)
            if isinstance(found, Segmentation):
                assert all(len(c.points) >= 3 for s in found.structures for c in s.contours)
            else:
                assert found.isprintable()


@reused
@given(st.one_of(st.text(max_size=60), st.text(alphabet='xyz\n 01"#/slice,', max_size=60)))
def test_arbitrary_text_is_read_or_refused(opened: Open, text: str) -> None:
    found = outcome(opened, text.encode("utf-8", "replace"))
    assert isinstance(found, Segmentation) or found.isprintable()


@reused
@given(st.binary(max_size=60).filter(lambda b: b"\0" not in b[:4]))
def test_arbitrary_bytes_are_read_or_refused(opened: Open, data: bytes) -> None:
    found = outcome(opened, data)
    assert isinstance(found, Segmentation) or found.isprintable()


@given(st.text(alphabet="019.eE+- ", min_size=1, max_size=12))
def test_only_decimal_numbers_are_read(text: str) -> None:
    words = text.split()
    fine = bool(words) and all(NUMBER.fullmatch(w) for w in words) and all(abs(float(w)) <= 1e6 for w in words)
    try:
        values = parse(text).values.tolist()
    except SegmentationError:
        assert not fine
    else:
        assert fine
        assert values == [float(w) for w in words]


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.txt", f"{tmp_path}/nul\0.txt"):
        with pytest.raises(SegmentationError):
            read_segmentation(path)


# Units and pixels.


def test_points_count_from_pixel_centres_and_pixel_base(opened: Open) -> None:
    points = {base: opened(SQUARE, text_format="points", pixel_base=base) for base in (0, 1)}
    first = {base: s.structures[0].contours[0].points[0].tolist() for base, s in points.items()}
    assert first == {0: [10, 20], 1: [9, 19]}
    # ImageJ counts from the corner of the first pixel, and `index_base` applies to slices only.
    assert opened(SQUARE, pixel_base=1).structures[0].contours[0].points[0].tolist() == [9.5, 19.5]
    same = opened(SQUARE, text_format="points", index_base=1)
    assert same.structures[0].contours[0].points[0].tolist() == [10, 20]
    assert opened(SQUARE).structures[0].contours[0].points[0].tolist() == [9.5, 19.5]


@pytest.mark.parametrize("text", [SQUARE.replace("10", "-120"), "slice x y\n3 -120 5\n3 -100 5\n3 -100 9\n"])
def test_coordinates_before_the_slice_are_refused_unless_they_are_stated_as_pixels(opened: Open, text: str) -> None:
    assert "-120 lies before the slice" in refusal(opened, text, text_format="points" if "slice" in text else None)
    assert len(opened(text, text_format="points" if "slice" in text else None, units="px").structures) == 1


def test_a_single_label_1_or_255_has_the_name_of_the_file_and_others_their_number(opened: Open) -> None:
    for label, name in ((1, "liver"), (255, "liver"), (2, "2")):
        text = "0 0 0 0 0 0\n" * 2 + f"0 0 {label} 0 0 0\n"
        assert [s.name for s in opened(text).structures] == [name]
    empty = opened("0 0 0 0 0 0\n" * 2)
    assert (empty.structures, empty.notes) == ((), ("nothing is painted: every value is 0",))


def test_centimetres_are_ten_millimetres(opened: Open) -> None:
    (contour,) = opened("1.5 2\n3 2\n3 4.25\n", units="cm").structures[0].contours
    assert (contour.frame, contour.points.tolist()) == ("corner", [[15, 20], [30, 20], [30, 42.5]])


def test_units_are_those_in_which_the_outline_lies_in_the_slice(opened: Open) -> None:
    small = Plane(100, 100, (0.7, 0.7))
    text = "80.3 10.1\n90.2 10.7\n90.9 20.3\n"  # as mm, columns 114 and more
    assert opened(text, small).structures[0].contours[0].frame == "pixel"
    large = Plane(100, 100, (3.0, 3.0))
    text = "180.3 10.1\n190.2 10.7\n190.9 20.3\n"
    assert opened(text, large).structures[0].contours[0].frame == "corner"


def test_units_of_header_and_option_that_differ_are_refused(opened: Open) -> None:
    assert "header says mm" in refusal(opened, "x_mm y_mm\n1 2\n3 4\n5 5\n", units="px")


def test_fractions_of_a_slice_need_its_size(opened: Open) -> None:
    text = "2 0.25 0.5 0.75 0.5 0.75 1.0\n"
    assert "fractions" in refusal(opened, text)
    (structure,) = opened(text, Plane(40, 80, (1.0, 1.0))).structures
    assert structure.name == "2"
    assert structure.contours[0].points.tolist() == [[19.5, 19.5], [59.5, 19.5], [59.5, 39.5]]


def test_points_in_pixels_may_have_z_in_mm(opened: Open) -> None:
    text = XYZ.replace("3\n", "-125.5\n").replace("4\n", "-128.0\n")
    contours = opened(text, units="px", slice_from="z").structures[0].contours
    assert [c.slice for c in contours] == [SliceKey("z", -125.5), SliceKey("z", -128.0)]
    assert contours[0].points.tolist() == [[1, 2], [9, 2], [9, 8], [1, 8]]
    assert opened(text, units="mm").structures[0].contours[0].points[2].tolist() == [9, 8, -125.5]


# Separation of contours.


def test_contours_end_at_blank_lines_at_new_slices_and_where_they_close(opened: Open) -> None:
    a, b = [(1, 1), (5, 1), (5, 5)], [(11, 1), (15, 1), (15, 5), (12, 7)]
    closed = [*a, a[0]]
    by_blank = "\n\n".join("\n".join(f"4 {x} {y}" for x, y in p) for p in (a, b))
    by_slice = "\n".join(f"{z} {x} {y}" for z, p in ((1, a), (2, b), (1, a)) for x, y in p)
    by_closing = "\n".join(f"4 {x} {y}" for x, y in [*closed, *b, b[0]])
    assert [len(c.points) for c in opened(by_blank).structures[0].contours] == [3, 4]
    assert [len(c.points) for c in opened(by_slice).structures[0].contours] == [3, 4, 3]
    assert [len(c.points) for c in opened(by_closing).structures[0].contours] == [4, 5]


def test_blank_lines_between_all_lines_separate_no_contours(opened: Open) -> None:
    assert len(opened(SQUARE.replace("\n", "\n\n")).structures[0].contours) == 1
    assert len(opened(SQUARE + "\n" + SQUARE).structures[0].contours) == 2


def test_single_points_are_left_out_with_a_note(opened: Open) -> None:
    found = opened("slice x y\n" + "1 1 1\n1 5 1\n1 5 5\n2 3 3\n", text_format="points")
    assert len(found.structures[0].contours) == 1
    assert found.notes == ("1 contour of fewer than 3 points, which have no area, the first in line 5",)


def test_many_closed_contours_in_one_slice_are_read(opened: Open) -> None:
    text = "".join(f"0 {n} 0\n0 {n} 5\n0 {n + 1} 5\n0 {n} 0\n" for n in range(20_000))
    assert len(opened(text).structures[0].contours) == 20_000


# Names of files.


@pytest.mark.parametrize(
    ("path", "key", "name"),
    [
        ("IM-0001-0048-icontour-manual.txt", SliceKey("number", 48), "IM-0001-icontour-manual"),
        ("lesion_z-125.txt", SliceKey("z", -125), "lesion"),
        ("z=12.5_lesion.txt", SliceKey("z", 12.5), "lesion"),
        ("a/liver/z_-3", SliceKey("z", -3), "liver"),
        ("a/liver/z-12.5", SliceKey("z", -12.5), "liver"),
        ("a/liver/0012.txt", SliceKey("number", 12), "liver"),
        ("a/liver/1.2.840.113619.2.55.txt", SliceKey("uid", "1.2.840.113619.2.55"), "liver"),
        ("1.2.840.113619.2.55-tumour", SliceKey("uid", "1.2.840.113619.2.55"), "tumour"),
        ("fuzz12.txt", SliceKey("number", 12), "fuzz"),
        ("liver.txt", None, "liver"),
    ],
)
def test_a_file_name_gives_slice_and_structure(path: str, key: SliceKey | None, name: str) -> None:
    assert slice_and_structure(path, None) == (key, name)


def test_slice_from_restricts_where_the_slice_is_read() -> None:
    assert slice_and_structure("lesion_-125.5.txt", "z") == (SliceKey("z", -125.5), "lesion")
    for slice_from in ("uid", "column", "z", "name"):
        with pytest.raises(SegmentationError, match=f"--slice-from {slice_from}"):
            slice_and_structure("lesion.txt", slice_from)


def test_a_text_that_does_not_fit_text_format_is_refused(opened: Open) -> None:
    assert "none of imagej-xy" in refusal(opened, SQUARE, text_format="dxf")
    assert "not --text-format imagej-xy" in refusal(opened, XYZ, text_format="imagej-xy")
    assert "not --text-format imagej-values" in refusal(opened, SQUARE, text_format="imagej-values")
    assert "2 numbers: a polygon takes" in refusal(opened, SQUARE, text_format="polygons")
