"""Reading contours of plastimatch (CXT)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuprep.errors import SegmentationError
from gpuprep.masks.formats import cxt
from gpuprep.masks.text_parsing import numbers, unique_names

HEADER = "CT_SERIES_UID 1.2.3\nPATIENT_NAME Doe^Jane\nROI_NAMES\n1|255 0 0|Lung\n2|0 0 255|Heart\nEND_OF_ROI_NAMES\n"
TRIANGLE = "0\\0\\5\\3\\0\\5\\0\\4\\5"

Polygon = list[tuple[float, float, float]]

coordinates = st.floats(-1e6, 1e6, allow_nan=False)
polygons = st.lists(st.tuples(coordinates, coordinates, coordinates), min_size=3, max_size=8)
names = st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs", "Z", "Cc")), min_size=1, max_size=12)


def written(structures: list[tuple[str, list[Polygon]]], colour: str = "255 0 0") -> str:
    """Return the text that plastimatch would write."""
    text = ["CT_SERIES_UID 1.2.3", "CT_FRAME_OF_REFERENCE_UID 1.2.4", "STUDY_ID ", "ROI_NAMES"]
    text += [f"{i}|{colour}|{name}" for i, (name, _) in enumerate(structures, 1)]
    text.append("END_OF_ROI_NAMES")
    for i, (_, contours) in enumerate(structures, 1):
        for k, points in enumerate(contours):
            image = f"{k}|1.2.5.{k}" if k % 2 == 0 else "|"  # slice number and UID are optional
            text.append(f"{i}||{len(points)}|{image}|" + "\\".join(repr(v) for point in points for v in point))
    return "\n".join(text) + "\n"


@given(
    st.lists(st.tuples(names, st.lists(polygons, max_size=3)), min_size=1, max_size=4, unique_by=lambda s: s[0]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["255 0 0", "255\\0\\0"]),
)
def test_contours_of_a_written_file_are_read_back(
    structures: list[tuple[str, list[Polygon]]], newline: str, bom: str, colour: str
) -> None:
    text = bom + written(structures, colour).replace("\n", newline)
    assert cxt.recognised(text) == "its line ROI_NAMES"
    found = cxt.read(text, "a.cxt")
    assert [s.name for s in found.structures] == [name for name, _ in structures]
    for structure, (_, contours) in zip(found.structures, structures, strict=True):
        assert [[*map(tuple, c.points.tolist())] for c in structure.contours] == contours
        assert {(c.frame, c.slice, c.rule) for c in structure.contours} <= {("patient", None, "even-odd")}
    assert found.series_uids == ("1.2.3",)
    assert found.frame_of_reference_uid == "1.2.4"
    assert found.sop_uids == {f"1.2.5.{k}" for _, contours in structures for k in range(0, len(contours), 2)}
    assert (found.format, found.notes) == ("plastimatch CXT", ())


def test_equal_names_get_their_number_and_missing_ones_a_default() -> None:
    text = "ROI_NAMES\n3|1 2 3|PTV\n4|1 2 3|\n5|1 2 3\n6|1 2 3|a|b\n9|1 2 3|PTV\nEND_OF_ROI_NAMES\n"
    found = cxt.read(text, "")
    assert [s.name for s in found.structures] == ["PTV (3)", "ROI 4", "ROI 5", "a|b", "PTV (9)"]
    assert not any(s.contours for s in found.structures)


def test_a_name_that_ends_in_a_number_does_not_collide_with_a_numbered_one() -> None:
    assert unique_names([("a", 1), ("a (1)", 2), ("a", 3)]) == ["a (1) (1)", "a (1)", "a (3)"]


def test_contours_of_fewer_than_three_points_are_counted_in_a_note() -> None:
    found = cxt.read(f"{HEADER}1||0|||\n1||1|||1\\2\\3\n2||2|||1\\2\\3\\4\\5\\6\n2||3|||{TRIANGLE}\n", "")
    assert [len(s.contours) for s in found.structures] == [0, 1]
    assert found.notes == ("3 of its contours have fewer than 3 points: marks, not areas, left out",)


@pytest.mark.parametrize(
    ("lines", "position", "words"),
    [
        ("1||3|||0\\0\\5\\3\\0\\5\\0\\4", "line 7, column 4: ", "3 × 3 coordinates, but 8 follow"),
        ("1||4|||" + TRIANGLE, "line 7, column 4: ", "4 points are announced"),
        ("1||x|||" + TRIANGLE, "line 7, column 4: ", "'x' is not a number of points"),
        ("7||3|||" + TRIANGLE, "line 7, column 1: ", "'7' is not the number of a structure"),
        ("\n1||3|||0\\0\\5\\3\\zero\\5\\0\\4\\5", "line 8, column 16: ", "'zero' is not a number"),
        ("1||3|||0\\0\\5\\3\\\\5\\0\\4\\5", "line 7, column 16: ", "'' is not a number"),
        ("1||3|||nan\\0\\5\\3\\0\\5\\0\\4\\5", "line 7, column 8: ", "'nan'"),
        ("1||3|||0\\inf\\5\\3\\0\\5\\0\\4\\5", "line 7, column 10: ", "'inf'"),
        ("1||3|||0\\0\\1e400\\3\\0\\5\\0\\4\\5", "line 7, column 12: ", "'1e400'"),
        ("1||3|||0\\0\\1000000.1\\3\\0\\5\\0\\4\\5", "line 7, column 12: ", "'1000000.1'"),
        ("1||3|||0\\0\\1_0\\3\\0\\5\\0\\4\\5", "line 7, column 12: ", "'1_0'"),
        ("1||3|||0\\0\\５\\3\\0\\5\\0\\4\\5", "line 7, column 12: ", "'５'"),
        ("1||3||" + TRIANGLE, "line 7, column 24: ", "5 of 6 fields"),
        ("\x00\x01", "line 7, column 3: ", "1 of 6 fields"),
    ],
)
def test_damage_is_refused_with_line_and_column(lines: str, position: str, words: str) -> None:
    with pytest.raises(SegmentationError) as caught:
        cxt.read(HEADER + lines, "")
    assert str(caught.value).startswith(position)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no line ROI_NAMES"),
        ("CT_SERIES_UID 1.2\nPATIENT_NAME Doe^Jane\n", "there is no line ROI_NAMES"),
        ("ROI_NAMES\nEND_OF_ROI_NAMES\n", "line 2, column 1: no structure is named"),
        ("ROI_NAMES\n1|1 2 3|a", "line 2, column 1: the file ends before END_OF_ROI_NAMES"),
        ("ROI_NAMES\nx|1 2 3|a\nEND_OF_ROI_NAMES", "line 2, column 1: the line does not begin with the number"),
        ("ROI_NAMES\nPATIENT_NAME Doe^Jane\nEND_OF_ROI_NAMES", "line 2, column 1: the line does not begin"),
        ("ROI_NAMES\n1|1 2 3|a\n1|1 2 3|b\nEND_OF_ROI_NAMES", "line 3, column 1: structure number '1' is listed twice"),
    ],
)
def test_incomplete_files_are_refused(text: str, words: str) -> None:
    with pytest.raises(SegmentationError, match=r"^[^\n]*$") as caught:
        cxt.read(text, "")
    assert words in str(caught.value)
    assert "Doe" not in str(caught.value)


def test_huge_lines_are_read_or_refused() -> None:
    count = 500_000
    found = cxt.read(f"{HEADER}1||{count}|||" + "\\".join(["1.25\\-2.5\\300.125"] * count), "")
    points = found.structures[0].contours[0].points
    assert points.shape == (count, 3)
    assert points.sum(axis=0).tolist() == [1.25 * count, -2.5 * count, 300.125 * count]
    with pytest.raises(SegmentationError, match=r"line 7, column 8: '1{40}…'"):
        cxt.read(f"{HEADER}1||3|||" + "1" * 20_000_000, "")
    with pytest.raises(SegmentationError, match=r"line 7, column 20000001: .* 1 of 6 fields"):
        cxt.read(HEADER + "1" * 20_000_000, "")


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for whole in (text, HEADER + text, HEADER + "1||3|||" + text, "ROI_NAMES\n" + text):
        cxt.recognised(whole)
        try:
            cxt.read(whole, "")
        except SegmentationError as exc:
            assert str(exc).isprintable()  # noqa: PT017


@given(st.text("0123456789+-.eE_ \tnaif٣５", max_size=8))
def test_decimal_numbers_are_read_as_python_reads_them_and_others_refused(text: str) -> None:
    try:
        expected = float(text) if text.isascii() and not set(text) & set("_naif") else None
    except ValueError:
        expected = None
    if expected is None or abs(expected) > 1e6:
        with pytest.raises(SegmentationError, match="line 3, column 4"):
            numbers(["1", text], lambda i: (3, 4 * i))
    else:
        assert numbers(["1", text], lambda i: (3, 4 * i)).tolist() == [1.0, expected]


def test_contours_equal_those_of_the_rtstruct_the_file_was_made_from(data: Path) -> None:
    # The RTSTRUCT is read by pydicom alone.
    file = data / "txt-formats" / "plastimatch_cxt" / "4dlung-113_0.cxt"
    found = cxt.read(file.read_text(), str(file))
    for candidate in (data / "4dlung-113-crop").rglob("*.dcm"):
        ds = pydicom.dcmread(candidate, stop_before_pixels=True)
        if ds.Modality == "RTSTRUCT":
            break
    numbers_to_names = {roi.ROINumber: roi.ROIName for roi in ds.StructureSetROISequence}
    truth = {
        str(numbers_to_names[roi.ReferencedROINumber]): [
            np.array(contour.ContourData, dtype=float).reshape(-1, 3) for contour in roi.ContourSequence
        ]
        for roi in ds.ROIContourSequence
    }
    assert {s.name: len(s.contours) for s in found.structures} == {name: len(cs) for name, cs in truth.items()}
    assert [len(s.contours) for s in found.structures] == [28, 21, 1, 5]  # lines of each in the file
    for structure in found.structures:
        for contour, points in zip(structure.contours, truth[structure.name], strict=True):
            np.testing.assert_allclose(contour.points, points, rtol=0, atol=1e-3)
    assert found.frame_of_reference_uid == ds.StructureSetROISequence[0].ReferencedFrameOfReferenceUID
