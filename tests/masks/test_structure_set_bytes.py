"""Structure sets are read from their bytes as pydicom reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from segmentations import read, write_rtstruct

from bench.micro.structure_set import element, item, structure_set
from gpuprep.dicom import sequence_items
from gpuprep.dicom.decimal_strings import parse_decimals
from gpuprep.errors import SegmentationError
from gpuprep.masks.formats import dicom_objects, rtstruct, segmentation_values

UIDS = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"]
NUMBERS = st.one_of(
    st.floats(-999, 999).map(lambda v: f"{v:.2f}"),
    st.integers(-99, 99).map(str),
    st.sampled_from(["1e2", "-1.5E-3", "+7", " 2.5", "3 ", "5.", ".5", "-0.0", "-123.45678901234567", "12345.678"]),
)
INVALID = st.sampled_from(["", "-", ".", "x", "nan", "1e400", "1_0", "1.2.3", "1000001", "1\0"])


@contextmanager
def pydicom_alone() -> Iterator[None]:
    """Read all sequences with pydicom, and all numbers with float()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom_objects, "_with_contours_as_bytes", lambda *_: None)
        patch.setattr(segmentation_values, "ordinary_items", lambda _: None)
        patch.setattr(rtstruct, "parse_decimals", lambda texts, _: [None] * len(texts))
        yield


def outcome(path: Path) -> tuple[Any, ...]:
    """Return the content of a structure set, or its error with the UIDs that it names."""
    try:
        found = read(path)
    except SegmentationError as exc:
        return str(exc), exc.series_uids, exc.frame_of_reference_uid, exc.sop_uids
    structures = [
        (s.name, s.frame_of_reference_uid, [(c.points.shape, c.points.tobytes(), c.rule) for c in s.contours])
        for s in found.structures
    ]
    listed = found.series_uids, found.study_uids, found.frame_of_reference_uid, found.series_by_frame
    return structures, listed, found.sop_uids, found.drawn_on, found.notes


def check(path: Path) -> tuple[Any, ...]:
    """Check that a file is read as pydicom reads it; return its content or error."""
    found = outcome(path)
    with pydicom_alone():
        assert outcome(path) == found
    return found


@pytest.fixture
def by_bytes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each sequence was read from its bytes."""
    kept: list[bool] = []
    split = sequence_items._split

    def watched(*args: Any) -> Any:
        found = split(*args)
        kept.append(found is not None)
        return found

    monkeypatch.setattr(sequence_items, "_split", watched)
    return kept


@st.composite
def structure_sets(draw: st.DrawFn) -> bytes:
    """Draw a structure set: both encodings and kinds of lengths, private elements, odd numbers and padding."""
    explicit = draw(st.booleans())

    def one(tag: int, vr: str, value: str) -> bytes:
        padded = value.encode() + (draw(st.sampled_from([b"", b" ", b"\0"])) if len(value) % 2 else b"")
        return element(tag, vr, padded, explicit=explicit)

    def sequence(tag: int, contents: list[bytes]) -> bytes:
        items = b"".join(item(c, undefined=draw(st.booleans())) for c in contents)
        return element(tag, "SQ", items, explicit=explicit, undefined=draw(st.booleans()))

    def private(group: int) -> bytes:
        kind = draw(st.sampled_from(["none", "none", "none", "text", "sequence"]))
        if kind == "none":
            return b""
        creator = one(group << 16 | 0x0010, "LO", "Vendor")
        if kind == "text":
            return creator + one(group << 16 | 0x1001, draw(st.sampled_from(["LO", "UN", "OB"])), "abc")
        return creator + sequence(group << 16 | 0x1002, [one(group << 16 | 0x1003, "LO", "x")])

    def contour() -> bytes:
        invalid = draw(st.integers(0, 30)) == 0
        count = 3 * draw(st.integers(0, 5)) + (draw(st.integers(0, 20)) == 0)
        numbers = draw(st.lists(NUMBERS, min_size=count, max_size=count)) + ([draw(INVALID)] if invalid else [])
        content = private(0x3005)
        if draw(st.booleans()):
            images = [
                one(0x0008_1155, "UI", f"1.2.{draw(st.integers(0, 3))}")
                + (one(0x0008_1160, "IS", draw(st.sampled_from(["1", "1\\2", "x"]))) if draw(st.booleans()) else b"")
                for _ in range(draw(st.integers(0, 2)))
            ]
            content += sequence(0x3006_0016, images)
        kinds = ["CLOSED_PLANAR", "CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "POINT", "x y", ""]
        content += one(0x3006_0042, "CS", draw(st.sampled_from(kinds)))
        if draw(st.integers(0, 4)) == 0:
            content += one(0x3006_0045, "DS", draw(st.sampled_from(["0\\0\\1.5", "0\\0\\0", "", "1\\x\\2", "1"])))
        if draw(st.booleans()):
            content += one(0x3006_0046, "IS", draw(st.sampled_from([str(count // 3), "7", ""])))
        return content + one(0x3006_0050, "DS", "\\".join(numbers)) + private(0x3007)

    def roi(number: int) -> bytes:
        content = private(0x3005)
        if draw(st.integers(0, 5)):
            content += sequence(0x3006_0040, [contour() for _ in range(draw(st.integers(0, 4)))])
        return content + (one(0x3006_0084, "IS", str(number)) if draw(st.integers(0, 9)) else b"")

    count = draw(st.integers(1, 3))
    described = [
        one(0x3006_0022, "IS", str(n)) + one(0x3006_0024, "UI", f"1.9.{n % 2}") + one(0x3006_0026, "LO", f"größe {n}")
        for n in range(1, count + 1)
    ]
    head = element(0x0002_0010, "UI", UIDS[explicit].encode())
    body = one(0x0008_0005, "CS", "ISO_IR 192") + one(0x0008_0016, "UI", "1.2.840.10008.5.1.4.1.1.481.3")
    body += private(0x3005) + sequence(0x3006_0020, described)
    body += sequence(0x3006_0039, [roi(n) for n in range(1, count + draw(st.integers(1, 2)))])
    after = draw(st.sampled_from(["none", "observations", "late"]))
    if after == "observations":
        body += sequence(0x3006_0080, [one(0x3006_0082, "IS", "1")]) + private(0x3007)
    elif after == "late":  # elements are not in order
        body += one(0x0020_0052, "UI", "1.2.77")
    return (bytes(128) + b"DICM" + head if draw(st.integers(0, 5)) else b"") + body


class TestAgainstPydicom:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
    @given(structure_sets())
    def test_structure_sets_are_read_as_by_pydicom(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "rs.dcm"
        path.write_bytes(content)
        check(path)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
    @given(structure_sets(), st.data())
    def test_damaged_structure_sets_are_read_as_by_pydicom(
        self, tmp_path: Path, content: bytes, data: st.DataObject
    ) -> None:
        damaged = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(damaged) - 1))
            damaged[at] = data.draw(st.one_of(st.sampled_from(b"\0\1\xff\\ .-9AZ"), st.integers(0, 255)))
        path = tmp_path / "rs.dcm"
        path.write_bytes(damaged[: data.draw(st.one_of(st.none(), st.integers(0, len(damaged))))])
        check(path)

    def test_real_structure_sets_are_read_as_by_pydicom(self, data: Path, by_bytes: list[bool]) -> None:
        paths = [*data.glob("ibsi-sts-4/dicom/*/CT/mask/RS.dcm"), *data.glob("rtutils-phantom/**/*rt.dcm")]
        paths += data.glob("4dlung-113-crop/**/*47.35/1-1.dcm")
        assert len(paths) >= 9
        for path in paths:
            structures, *_ = check(path)
            assert structures
        assert any(by_bytes)


class TestReadFromBytes:
    @pytest.mark.parametrize("undefined", [False, True])
    def test_ordinary_structure_sets_are_read_without_pydicom(
        self, tmp_path: Path, by_bytes: list[bool], undefined: bool
    ) -> None:
        path = tmp_path / "rs.dcm"
        path.write_bytes(structure_set(2, 3, 20, 2, undefined=undefined))
        structures, *_ = check(path)
        assert [(name, len(contours)) for name, _, contours in structures] == [("ROI 1", 3), ("ROI 2", 3)]
        assert by_bytes == [True] * (1 + 2 + 3)  # ROIs; contours of each; three images, which both refer to

    def test_an_unusual_sequence_alone_is_left_to_pydicom(self, tmp_path: Path, by_bytes: list[bool]) -> None:
        triangle = np.array([[0, 0, 1], [1, 0, 1], [1, 1.5, 1]])
        path = write_rtstruct(tmp_path / "rs.dcm", {"a": [triangle] * 2, "b": [triangle] * 2})
        content = path.read_bytes()
        assert content.count(b"\x06\x30\x46\x00IS") == 4
        path.write_bytes(content.replace(b"\x06\x30\x46\x00IS", b"\x06\x30\x46\x00ZZ", 1))  # an unknown VR
        structures, *_ = check(path)
        assert [len(contours) for _, _, contours in structures] == [2, 2]
        assert by_bytes == [True, False, True, True]  # ROIs; contours of a; contours of b; images of the series

    def test_very_long_contours_are_parsed_by_float(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rtstruct, "LONGEST_PARSED_BYTES", 100)
        path = tmp_path / "rs.dcm"
        path.write_bytes(structure_set(1, 2, 20, 2, undefined=False))
        parsed: list[bytes] = []

        def watched(texts: Sequence[bytes], largest: float) -> Any:
            parsed.extend(texts)
            return parse_decimals(texts, largest)

        monkeypatch.setattr(rtstruct, "parse_decimals", watched)
        structures, *_ = check(path)
        assert [shape for _, _, contours in structures for shape, *_ in contours] == [(20, 3)] * 2
        assert parsed == [b"", b""]
