"""Reading regions of interest of Pinnacle."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuprep.errors import SegmentationError
from gpuprep.masks.formats import pinnacle
from gpuprep.masks.model import Segmentation

Polygon = list[tuple[float, float, float]]

coordinates = st.floats(-1e5, 1e5, allow_nan=False)
polygons = st.lists(st.tuples(coordinates, coordinates, coordinates), min_size=3, max_size=8)
names = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs", "Z", "Cc")), min_size=1, max_size=12)


def written(rois: list[tuple[str, list[Polygon]]]) -> str:
    """Return the text that Pinnacle would write."""
    text = "// Region of Interest file\n// Data set: DOE^JANE\n\n file_stamp={\n  write_date: today\n  }; // End\n"
    for name, curves in rois:
        text += f"//  Beginning of ROI: {name}\n roi={{\n     name: {name}\n  volume_name: DOE^JANE\n  color: red\n"
        text += f"   density_units:   g/cm^3\n   volume =  1.5;\n   num_curve = {len(curves)};\n"
        for i, points in enumerate(curves, 1):
            text += f"   curve={{\n    flags =  131092;\n    num_points =  {len(points)};\npoints={{\n"
            text += "".join(f"{x!r} {y!r} {z!r}\n" for x, y, z in points)
            text += f" }};  // End of points for curve {i}\n}}; // End of curve {i}\n"
        text += (
            "   surface_mesh={\n    samples = 1;\n    vertices={\n1 2 3\n };  // End of vertices\n}; // End of mesh\n"
        )
        text += f"        }}; // End of ROI {name}\n"
    return text


TRIANGLE: Polygon = [(1.0, 2.0, 3.0), (4.0, 2.0, 3.0), (1.0, 5.0, 3.0)]
START = written([("a", [TRIANGLE])]).partition("points={\n")[0] + "points={\n"  # 18 lines


def in_folder(folder: Path, header: str | None = None, points: Polygon = TRIANGLE) -> Segmentation:
    folder.mkdir(parents=True, exist_ok=True)
    if header is not None:
        (folder / "ImageSet_0.header").write_text(header)
    return pinnacle.read(written([("a", [points])]), str(folder / "plan.roi"))


def image(position: str, start: tuple[float, float], dicom: tuple[float, float] | None = None) -> str:
    """Return the header of an image of 100 × 100 × 10 voxels of 0.1 × 0.1 × 0.5 cm."""
    text = "x_dim = 100;\ny_dim = 100;\nz_dim = 10;\nx_pixdim = 0.1;\ny_pixdim = 0.1;\nz_pixdim = 0.5;\n"
    text += f"x_start = {start[0]};\ny_start = {start[1]};\nz_start = 0.0;\npatient_position : {position}\n"
    text += "db_name : DOE^JANE\nseries_UID : 1.2.3\n"
    return text + (f"x_start_dicom = {dicom[0]};\ny_start_dicom = {dicom[1]};\n" if dicom else "")


@given(
    st.lists(st.tuples(names, st.lists(polygons, max_size=3)), min_size=1, max_size=4, unique_by=lambda s: s[0]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", "\ufeff"]),
)
def test_regions_of_a_written_file_are_read_back(rois: list[tuple[str, list[Polygon]]], newline: str, bom: str) -> None:
    text = bom + written(rois).replace("\n", newline)
    assert pinnacle.recognised(text) == "its blocks roi={"
    found = pinnacle.read(text, "/nowhere/plan.roi")
    assert [s.name for s in found.structures] == [name for name, _ in rois]
    for structure, (_, curves) in zip(found.structures, rois, strict=True):
        # Without a header, head first and supine is assumed: x to the left, y up, z to the feet, cm to mm.
        expected = [[(10 * x, -10 * y, -10 * z) for x, y, z in points] for points in curves]
        assert [[*map(tuple, c.points.tolist())] for c in structure.contours] == expected
        assert {(c.frame, c.slice, c.rule) for c in structure.contours} <= {("patient", None, "even-odd")}
    assert found.format == "Pinnacle plan.roi"
    assert any("HFS" in note for note in found.notes)


@pytest.mark.parametrize(
    ("position", "left", "posterior", "superior"),
    [
        # Directions in the patient of Pinnacle's +x (right, seen from the foot of the table), +y (up) and +z (out of
        # the gantry). HFS: left, anterior, inferior.
        ("HFS", 1, -1, -1),
        ("HFP", -1, 1, -1),
        ("FFS", -1, -1, 1),
        ("FFP", 1, 1, 1),
    ],
)
def test_axes_are_converted_for_every_patient_position(
    tmp_path: Path, position: str, left: int, posterior: int, superior: int
) -> None:
    found = in_folder(tmp_path, image(position, (0, 0)))
    expected = [[10 * left * x, 10 * posterior * y, 10 * superior * z] for x, y, z in TRIANGLE]
    assert found.structures[0].contours[0].points.tolist() == expected
    assert (found.series_uids, found.notes) == (("1.2.3",), ())


def test_the_header_may_be_one_folder_above_a_plan_folder(tmp_path: Path) -> None:
    (tmp_path / "ImageSet_3.header").write_text(image("FFP", (0, 0)))
    assert in_folder(tmp_path / "Plan_0").structures[0].contours[0].points[0].tolist() == [10, 20, 30]
    assert in_folder(tmp_path / "other").structures[0].contours[0].points[0].tolist() == [10, -20, -30]


def test_several_headers_are_ignored_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "ImageSet_1.header").write_text(image("FFP", (0, 0)))
    found = in_folder(tmp_path, image("FFP", (0, 0)))
    assert found.structures[0].contours[0].points[0].tolist() == [10, -20, -30]
    assert len(found.notes) == 2
    assert "several" in found.notes[0]


def test_positions_of_old_versions_are_moved_to_the_origin_of_dicom(tmp_path: Path) -> None:
    # The points are at x = 1 to 4 cm and y = 2 to 5 cm; the image has 10 × 10 cm.
    inside = in_folder(tmp_path / "a", image("HFS", (0, -50), (0, 0)))
    assert (inside.structures[0].contours[0].points[0].tolist(), inside.notes) == ([10, -20, -30], ())
    old = in_folder(tmp_path / "b", image("HFS", (0, 0), (-20, -30)))
    assert old.structures[0].contours[0].points[0].tolist() == [-190, 280, -30]  # 1 − 20, −(2 − 30), −3 cm
    assert "before version 9" in old.notes[0]
    either = in_folder(tmp_path / "c", image("HFS", (0, 0), (0, -2)))
    assert either.structures[0].contours[0].points[0].tolist() == [10, -20, -30]
    assert "20 mm off" in either.notes[0]
    with pytest.raises(SegmentationError, match="outside of the image"):
        in_folder(tmp_path / "d", image("HFS", (50, 0), (-20, -30)))


def test_unknown_patient_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SegmentationError, match="patient_position 'HFDL'; known are HFS, HFP, FFS, FFP"):
        in_folder(tmp_path, image("HFDL", (0, 0)))


def test_equal_names_get_their_number_and_short_curves_are_counted() -> None:
    text = written([("PTV", [TRIANGLE]), ("", []), ("PTV", [TRIANGLE[:1], TRIANGLE[:2]])])
    found = pinnacle.read(text, "/nowhere/plan.roi")
    assert [(s.name, len(s.contours)) for s in found.structures] == [("PTV (1)", 1), ("ROI 2", 0), ("PTV (3)", 0)]
    assert "2 of its curves have fewer than 3 points: marks, not areas, left out" in found.notes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no roi={"),
        ("// Region of Interest file\n", "there is no roi={"),
        ("};", "line 1, column 1: a block ends here that never began"),
        ("roi={\nname: a\n", "line 3, column 1: the file ends inside of 'roi', which began in line 1"),
        ("roi={ name: a };", "line 1, column 6: more follows in the first line of a block"),
        ("roi={\nnum_curve = 2;\n};", "line 2, column 1: 2 curves are announced, but 0 follow"),
        ("roi={\nnum_curve = x;\n};", "line 2, column 13: num_curve is 'x'"),
        ("a={\n" * 40, "line 33, column 1: blocks are nested more than 32 deep"),
        ("roi={\ncurve={\n1 2 3\n", "line 3, column 1: the line is out of place in a curve"),
        (START + "1 2 3\n4 5\n", "line 20, column 1: the line is not a point"),
        (START + "1 2 3\nvolume_name: DOE^JANE\n", "line 20, column 1: the line is not a point"),
        (START + "1 2 3\n4  x 6\n7 8 9\n", "line 20, column 4: 'x' is not a number"),
        (START + "nan 2 3\n1 2 3\n1 2 3\n", "line 19, column 1: 'nan'"),
        (START + "1 2 3\n1 2 3\n1 inf 3\n", "line 21, column 3: 'inf'"),
        (START + "1 2 3\n1 2 3\n1 2 1e400\n", "line 21, column 5: '1e400'"),
        (START + "1 2 3\n1 2 3\n1 2 1e6\n", "line 21, column 5: '1e6' is not a number from -100000 to 100000"),
        (START + "1 2 3\n1 2 3\n1 2 1_0\n", "line 21, column 5: '1_0'"),
        (START + "1 2 3\n1 2 3\n", "line 17, column 1: 3 points are announced, but 2 follow"),
        (START + "1 2 3\n" * 3 + "};\npoints={\n};\n", "line 23, column 1: a curve has points twice"),
    ],
)
def test_damage_is_refused_with_line_and_column(text: str, words: str) -> None:
    if text.startswith(START):
        text += "};\n};\n};\n"
    with pytest.raises(SegmentationError, match=r"^[^\n]*$") as caught:
        pinnacle.read(text, "/nowhere/plan.roi")
    assert words in str(caught.value)
    assert "DOE" not in str(caught.value)


def test_huge_files_are_read_or_refused() -> None:
    count = 300_000
    found = pinnacle.read(written([("a", [[(1.5, -2.25, 3.0)] * count])]), "/nowhere/plan.roi")
    points = found.structures[0].contours[0].points
    assert points.sum(axis=0).tolist() == [15.0 * count, 22.5 * count, -30.0 * count]
    blank = " " * 2_000_000
    for line in (
        f"num_curve ={blank}x",
        f"num_curve{blank}x",
        f"curve ={blank}x",
        f"curve={{{blank}x",
        f"name{blank}x",
    ):
        text = f"roi={{\n{line}\n}};\n"
        if line.startswith("curve={"):
            with pytest.raises(SegmentationError, match="line 2, column 8: more follows"):
                pinnacle.read(text, "/nowhere/plan.roi")
        else:
            assert pinnacle.read(text, "/nowhere/plan.roi").structures[0].name == "ROI 1"
    with pytest.raises(SegmentationError, match=r"line 19, column 1: the line is not a point"):
        pinnacle.read(START + "1" * 2_000_000 + "\n};\n};\n};\n", "/nowhere/plan.roi")


@given(st.text(), st.text("roi curvepnt_num123 .:=;{}\n", max_size=80))
def test_any_text_is_read_or_refused(text: str, alike: str) -> None:
    for whole in (text, alike, START + text, "roi={\n" + text, "roi={\n" + alike + "\n};\n"):
        pinnacle.recognised(whole)
        try:
            pinnacle.read(whole, "/nowhere/plan.roi")
        except SegmentationError as exc:
            assert str(exc).isprintable()  # noqa: PT017


@given(st.binary())
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "header"
    folder.mkdir(exist_ok=True)
    (folder / "ImageSet_0.header").write_bytes(b"patient_position : HFP\n" + header)
    try:
        found = in_folder(folder)
    except SegmentationError as exc:
        assert str(exc).isprintable()  # noqa: PT017
    else:
        assert len(found.structures) == 1


def test_regions_of_a_real_plan_have_the_stated_volumes_and_lie_in_its_image(data: Path) -> None:
    # Independent checks: the volumes in cm³ that Pinnacle wrote, against areas by the shoelace formula times the slice
    # spacing (z_pixdim, 2.5 mm); and the extent of the image by x_start_dicom, y_start_dicom and z_start of the header,
    # converted to patient coordinates (head first, supine) by hand.
    file = data / "txt-formats" / "pinnacle" / "plan.roi"
    text = file.read_text()
    found = pinnacle.read(text, str(file))
    assert [(s.name, len(s.contours)) for s in found.structures] == [
        ("bb", 8), ("ROI_1", 2), ("ROI_2", 8), ("ROI_3", 9), ("ROI_4", 2),
    ]  # fmt: skip
    assert found.notes == ()
    assert found.series_uids == ("1.2.840.113619.2.55.3.3535481354.000.3513513585.000",)
    stated = [float(v) for v in re.findall(r"^ +volume = +([0-9.]+);", text, re.MULTILINE)]
    for structure, volume_cm3 in zip(found.structures, stated, strict=True):
        mm3 = 0.0
        for contour in structure.contours:
            x, y, z = contour.points.T
            mm3 += 2.5 * abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
            # x begins at −250, with 512 pixels of 0.97656 mm; y of the last row is 249.02, of the first
            # 249.02 − 511 × 0.97656 = −250; z decreases from 87.5 in 101 steps of 2.5 mm.
            assert -250 <= x.min() <= x.max() <= 249.1
            assert -250 <= y.min() <= y.max() <= 249.1
            np.testing.assert_array_equal(np.unique(z), z[:1])
            assert 0 <= (87.5 - z[0]) / 2.5 <= 100
            assert (87.5 - z[0]) % 2.5 == 0
        assert mm3 / 1000 == pytest.approx(volume_cm3, abs=0.025)
    # The first point of the first curve is -1.07428 11.914 2 in the file.
    np.testing.assert_allclose(found.structures[0].contours[0].points[0], [-10.7428, -119.14, -20], rtol=0, atol=1e-9)
