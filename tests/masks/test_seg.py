"""Reading segmentation images, and refusing damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import axial, encoded_natively
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from segmentations import (
    DEFLATED_FRAMES,
    UNCOMPRESSED,
    check_truncations_are_refused,
    placed,
    read,
    read_damaged,
    refused,
    setting,
    write_seg,
)

from gpuprep.core.geometry import Geometry
from gpuprep.masks.formats import dicom_objects, seg
from gpuprep.masks.model import Segmentation, SliceKey

Kind = Literal["binary", "fractional", "labelmap"]
KINDS: list[Kind] = ["binary", "fractional", "labelmap"]
GRID = axial((4, 7, 9), (2.5, 0.8, 0.7))
LARGER = axial((4, 37, 41), (2.5, 0.8, 0.7))
"""Grid for JPEG 2000: OpenJPEG encodes no images smaller than 32 × 32."""


def blobs(shape: tuple[int, int, int] = GRID.shape, seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    """Return two segments that do not overlap, each empty in some slice."""
    values = np.random.default_rng(seed).integers(0, 4, shape)
    values[0] = 0
    values[1][values[1] == 2] = 0
    return {"Leber": values == 1, "Milz – ä": values == 2}


def check(found: Segmentation, masks: dict[str, NDArray[np.bool_]], grid: Geometry = GRID) -> None:
    """Compare names and voxels of all structures."""
    assert [s.name for s in found.structures] == list(masks)
    for structure, mask in zip(found.structures, masks.values(), strict=True):
        np.testing.assert_array_equal(placed(structure, grid), mask)


class TestVoxels:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "full"])
    def test_every_segmentation_type_is_read(self, tmp_path: Path, kind: Kind, sparse: bool) -> None:
        # A frame has 63 pixels: in a binary one, most begin in the middle of a byte.
        uids = [f"1.2.{n}" for n in range(4)]
        found = read(write_seg(tmp_path / "s.dcm", blobs(), GRID, kind=kind, sparse=sparse, sop_uids=uids))
        check(found, blobs())
        assert (found.format, found.series_uids, found.frame_of_reference_uid) == ("SEG", ("1.2.3.4",), "1.2.3.5")
        assert found.sop_uids == set(uids)
        assert found.notes == ()
        for structure in found.structures:
            for raster in structure.rasters:
                assert raster.matrix == (7, 9)
                assert raster.slice is None
                assert all(edge.any() for edge in (raster.mask[0], raster.mask[-1]))
                assert all(edge.any() for edge in (raster.mask[:, 0], raster.mask[:, -1]))
                assert raster.geometry is not None
                assert raster.geometry.spacing_mm == pytest.approx((2.5, 0.8, 0.7))

    def test_an_oblique_grid_is_read(self, tmp_path: Path) -> None:
        turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
        turn *= np.linalg.det(turn)
        affine = np.eye(4)
        affine[:3, :3] = np.stack([np.cross(turn[:, 0], turn[:, 1]), turn[:, 1], turn[:, 0]], 1) * [3.1, 0.9, 1.3]
        affine[:3, 3] = [-12.25, 250.5, -1033.125]
        grid = Geometry((4, 7, 9), affine)
        found = read(write_seg(tmp_path / "s.dcm", blobs(), grid))
        check(found, blobs(), grid)
        raster = found.structures[0].rasters[0]
        assert raster.geometry is not None
        np.testing.assert_allclose(raster.geometry.affine[:3, :3], affine[:3, :3], atol=1e-6)

    def test_overlapping_segments_are_read(self, tmp_path: Path) -> None:
        masks = {"all": np.ones(GRID.shape, dtype=bool), **blobs()}
        check(read(write_seg(tmp_path / "s.dcm", masks, GRID)), masks)

    @pytest.mark.parametrize("kind", KINDS)
    def test_empty_segments_are_kept(self, tmp_path: Path, kind: Kind) -> None:
        masks = {"none": np.zeros(GRID.shape, dtype=bool), **blobs()}
        check(read(write_seg(tmp_path / "s.dcm", masks, GRID, kind=kind)), masks)
        nothing = {"none": masks["none"]}
        check(read(write_seg(tmp_path / "s.dcm", nothing, GRID, kind=kind)), nothing)

    def test_a_binary_object_with_8_bits_per_pixel_is_read(self, tmp_path: Path) -> None:
        check(read(write_seg(tmp_path / "s.dcm", blobs(), GRID, bits=8)), blobs())

    @pytest.mark.parametrize("bits", [8, 16])
    @pytest.mark.parametrize("padding", [None, 0, 5])
    def test_padding_of_a_label_map_is_background(self, tmp_path: Path, bits: int, padding: int | None) -> None:
        numbers = [65000, 300] if bits == 16 else [7, 255]
        path = write_seg(
            tmp_path / "s.dcm", blobs(), GRID, kind="labelmap", bits=bits, padding=padding, numbers=numbers
        )
        check(read(path), blobs())

    def test_a_segment_0_described_as_background_is_left_out(self, tmp_path: Path) -> None:
        def describe(ds: Dataset) -> None:
            code = Dataset()
            code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "125040", "DCM", "Background"
            ds.SegmentSequence[0].SegmentedPropertyTypeCodeSequence = [code]

        first = ~(blobs()["Leber"] | blobs()["Milz – ä"])
        masks = {"Background": first, **blobs()}
        arguments: dict[str, Any] = {"kind": "labelmap", "numbers": [0, 1, 2], "sparse": False}
        check(read(write_seg(tmp_path / "s.dcm", masks, GRID, change=describe, **arguments)), blobs())
        # Described as anything else, 0 is a segment.
        check(read(write_seg(tmp_path / "s.dcm", masks, GRID, **arguments)), masks)

    def test_segments_without_description_are_named_by_their_number(self, tmp_path: Path) -> None:
        def forget(ds: Dataset) -> None:
            del ds.SegmentSequence[1]

        for kind in KINDS:
            found = read(write_seg(tmp_path / "s.dcm", blobs(), GRID, kind=kind, change=forget))
            check(found, dict(zip(["Leber", "segment 2"], blobs().values(), strict=True)))
            assert found.notes == ("segment 2 has pixels but no description",)

    def test_equal_names_get_their_number_and_missing_ones_a_default(self, tmp_path: Path) -> None:
        def rename(ds: Dataset) -> None:
            for item, name in zip(ds.SegmentSequence, ["GTV", "GTV", ""], strict=True):
                item.SegmentLabel = name

        masks = {"a": blobs()["Leber"], "b": blobs()["Milz – ä"], "c": blobs()["Leber"]}
        found = read(write_seg(tmp_path / "s.dcm", masks, GRID, change=rename))
        check(found, dict(zip(["GTV (1)", "GTV (2)", "segment 3"], masks.values(), strict=True)))

    @pytest.mark.parametrize(
        ("threshold", "first"), [(0.5, 5), (0.3, 3), (1.0, 10), (0.51, 6), (0.0, 1), (0.7, 7), (1.1, 11)]
    )
    def test_shares_from_the_threshold_on_belong_to_the_segment_but_0_never(
        self, tmp_path: Path, threshold: float, first: int
    ) -> None:
        shares = np.broadcast_to(np.arange(11) / 10, (1, 2, 11))
        grid = axial((1, 2, 11), (1, 1, 1))
        path = write_seg(tmp_path / "s.dcm", {"a": shares}, grid, kind="fractional", whole=10)
        expected = np.broadcast_to(np.arange(11) >= first, (1, 2, 11))
        np.testing.assert_array_equal(placed(read(path, threshold).structures[0], grid), expected)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    @given(
        hnp.arrays(np.bool_, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)),
        st.sampled_from(KINDS),
        st.booleans(),
    )
    def test_random_volumes_are_read(self, tmp_path: Path, mask: NDArray[np.bool_], kind: Kind, sparse: bool) -> None:
        grid = axial((mask.shape[0], mask.shape[1], mask.shape[2]), (2.5, 0.8, 0.7))
        path = write_seg(tmp_path / "s.dcm", {"a": mask}, grid, kind=kind, sparse=sparse)
        check(read(path), {"a": mask}, grid)


class TestEncodings:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian], ids=lambda s: s.name)
    def test_native_transfer_syntaxes_are_read(self, tmp_path: Path, kind: Kind, syntax: UID) -> None:
        check(read(write_seg(tmp_path / "s.dcm", blobs(), GRID, kind=kind, syntax=syntax)), blobs())

    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian], ids=lambda s: s.name)
    def test_files_without_meta_group_are_read(self, tmp_path: Path, syntax: UID) -> None:
        ds = pydicom.dcmread(write_seg(tmp_path / "s.dcm", blobs(), GRID))
        (tmp_path / "bare").write_bytes(encoded_natively(ds, syntax, meta=False))
        check(read(tmp_path / "bare"), blobs())

    def test_big_endian_words_are_read_and_bits_refused(self, tmp_path: Path) -> None:
        ds = pydicom.dcmread(write_seg(tmp_path / "s.dcm", blobs(), GRID, kind="labelmap", bits=16))
        (tmp_path / "big").write_bytes(encoded_natively(ds, ExplicitVRBigEndian))
        check(read(tmp_path / "big"), blobs())
        ds = pydicom.dcmread(write_seg(tmp_path / "s.dcm", blobs(), GRID))
        (tmp_path / "big").write_bytes(encoded_natively(ds, ExplicitVRBigEndian))
        assert "big-endian" in refused(tmp_path / "big")

    @pytest.mark.parametrize(("kind", "bits"), [("binary", 8), ("fractional", 8), ("labelmap", 8), ("labelmap", 16)])
    @pytest.mark.parametrize(
        "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, DEFLATED_FRAMES, UNCOMPRESSED], ids=lambda s: s.name
    )
    def test_encapsulated_transfer_syntaxes_are_read(self, tmp_path: Path, kind: Kind, bits: int, syntax: UID) -> None:
        masks = blobs(LARGER.shape)
        check(read(write_seg(tmp_path / "s.dcm", masks, LARGER, kind=kind, bits=bits, syntax=syntax)), masks, LARGER)

    @pytest.mark.parametrize("syntax", [DEFLATED_FRAMES, UNCOMPRESSED], ids=lambda s: s.name)
    def test_encapsulated_frames_of_single_bits_begin_at_a_byte(self, tmp_path: Path, syntax: UID) -> None:
        check(read(write_seg(tmp_path / "s.dcm", blobs(), GRID, syntax=syntax)), blobs())

    @pytest.mark.parametrize("syntax", [DEFLATED_FRAMES, UNCOMPRESSED], ids=lambda s: s.name)
    def test_encapsulated_frames_with_too_few_bits_are_refused(self, tmp_path: Path, syntax: UID) -> None:
        path = write_seg(tmp_path / "s.dcm", blobs(), GRID, syntax=syntax, change=setting(Rows=4000))
        assert "bytes, not" in refused(path) or "bytes and does not" in refused(path)


class TestPositions:
    def test_a_frame_without_position_lies_on_its_source_image(self, tmp_path: Path) -> None:
        uids = [f"1.2.{n}" for n in range(4)]
        found = read(write_seg(tmp_path / "s.dcm", blobs(), GRID, placed=False, sop_uids=uids))
        for structure, mask in zip(found.structures, blobs().values(), strict=True):
            keys = [SliceKey("uid", uids[k]) for k in range(4) if mask[k].any()]
            assert [r.slice for r in structure.rasters] == keys
            assert all(r.geometry is None and r.matrix == (7, 9) for r in structure.rasters)

    def test_a_frame_without_position_and_image_is_refused(self, tmp_path: Path) -> None:
        assert "frame 1 does not say where it lies" in refused(
            write_seg(tmp_path / "s.dcm", blobs(), GRID, placed=False)
        )

    def test_a_frame_number_does_not_replace_the_position(self, tmp_path: Path) -> None:
        def of_a_frame(ds: Dataset) -> None:
            for group in ds.PerFrameFunctionalGroupsSequence:
                group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = 2

        path = write_seg(tmp_path / "s.dcm", blobs(), GRID, placed=False, sop_uids=["1.2"] * 4, change=of_a_frame)
        assert "refers to 1 images" in refused(path)

    def test_a_frame_may_have_its_own_orientation_and_spacing(self, tmp_path: Path) -> None:
        def move(ds: Dataset) -> None:
            shared = ds.SharedFunctionalGroupsSequence[0]
            for group in ds.PerFrameFunctionalGroupsSequence:
                group.PlaneOrientationSequence = shared.PlaneOrientationSequence
                group.PixelMeasuresSequence = shared.PixelMeasuresSequence
            ds.SharedFunctionalGroupsSequence = []

        check(read(write_seg(tmp_path / "s.dcm", blobs(), GRID, change=move)), blobs())

    def test_frames_of_the_only_segment_need_no_segment_number(self, tmp_path: Path) -> None:
        def forget(ds: Dataset) -> None:
            for group in ds.PerFrameFunctionalGroupsSequence:
                del group.SegmentIdentificationSequence

        one = {"Leber": blobs()["Leber"]}
        check(read(write_seg(tmp_path / "s.dcm", one, GRID, change=forget)), one)
        text = refused(write_seg(tmp_path / "s.dcm", blobs(), GRID, change=forget))
        assert "frame 1 does not say which of 2 segments" in text


def setting_macro(**attributes: Any) -> Callable[[Dataset], None]:
    """Return a function that sets attributes of the position of frame 2, or of the shared orientation and spacing."""

    def change(ds: Dataset) -> None:
        group, shared = ds.PerFrameFunctionalGroupsSequence[1], ds.SharedFunctionalGroupsSequence[0]
        macros = (group.PlanePositionSequence, shared.PlaneOrientationSequence, shared.PixelMeasuresSequence)
        for keyword, value in attributes.items():
            next(m[0] for m in macros if keyword in m[0])[keyword].value = value

    return change


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (setting(NumberOfFrames=6), "functional groups of 5 frames, but Number of Frames is 6"),
            (setting(NumberOfFrames=2**31 - 1), "2147483647"),
            (setting(NumberOfFrames=0), "0 frames of 7 × 9"),
            (setting(NumberOfFrames=-1), "-1 frames of 7 × 9"),
            (setting(Rows=65535, Columns=65535), "5 frames of 65535 × 65535"),
            (setting(Rows=8192, Columns=8192), "40 bytes, and 5 frames of 8192 × 8192 in 1 bits take 41943040"),
            (setting(Rows=0), "0 × 9"),
            (setting(Rows=6), "40 bytes, and 5 frames of 6 × 9 in 1 bits take 34"),
            (setting(BitsAllocated=16), "16 bits: BINARY needs one sample of 1 or 8 bits"),
            (setting(BitsAllocated=8), "40 bytes, and 5 frames of 7 × 9 in 8 bits take 315"),
            (setting(SamplesPerPixel=3), "3 samples"),
            (setting(SegmentationType="PAINTING"), "'PAINTING', not one of BINARY"),
            (
                setting(SegmentationType="FRACTIONAL", BitsAllocated=8, PixelData=bytes(316)),
                "no Maximum Fractional Value",
            ),
            (setting(DimensionOrganizationType="TILED_FULL"), "tiles"),
            (setting(PixelData=b""), "no Pixel Data"),
            (setting(PerFrameFunctionalGroupsSequence=[]), "functional groups of 0 frames"),
            (
                setting_macro(ImagePositionPatient=[0, 0, 2e6]),
                "frame 2: its Image Position Patient is '0.0\\0.0\\2000000.0'",
            ),
            (
                setting_macro(ImagePositionPatient=[0, 1]),
                "frame 2: its Image Position Patient is '0.0\\1.0', not 3 numbers",
            ),
            (setting_macro(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "frame 1: its Image Orientation Patient"),
            (setting_macro(ImageOrientationPatient=[0.5, 0, 0, 0, 1, 0]), "not perpendicular units"),
            (setting_macro(PixelSpacing=[0, 1]), "frame 1: its Pixel Spacing is [0.0, 1.0] mm"),
            (setting_macro(PixelSpacing=[-1, 1]), "frame 1: its Pixel Spacing is [-1.0, 1.0] mm"),
        ],
    )
    def test_impossible_headers_are_refused(self, tmp_path: Path, change: Callable[[Dataset], None], text: str) -> None:
        assert text in refused(write_seg(tmp_path / "s.dcm", blobs(), GRID, change=change))

    def test_segments_of_equal_number_are_refused(self, tmp_path: Path) -> None:
        def clash(ds: Dataset) -> None:
            ds.SegmentSequence[1].SegmentNumber = 1

        assert "no unique Segment Number" in refused(write_seg(tmp_path / "s.dcm", blobs(), GRID, change=clash))

    @pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, DEFLATED_FRAMES], ids=lambda s: s.name)
    @pytest.mark.parametrize("count", [4, 6])
    def test_missing_or_additional_encapsulated_frames_are_refused(
        self, tmp_path: Path, syntax: UID, count: int
    ) -> None:
        def recount(ds: Dataset) -> None:
            groups = ds.PerFrameFunctionalGroupsSequence
            ds.PerFrameFunctionalGroupsSequence = [*groups, groups[-1]][:count]
            ds.NumberOfFrames = count

        path = tmp_path / "s.dcm"
        refused(write_seg(path, blobs(LARGER.shape), LARGER, bits=8, syntax=syntax, change=recount))

    @pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, DEFLATED_FRAMES], ids=lambda s: s.name)
    def test_encapsulated_frames_of_another_size_are_refused(self, tmp_path: Path, syntax: UID) -> None:
        refused(write_seg(tmp_path / "s.dcm", blobs(), GRID, bits=8, syntax=syntax, change=setting(Rows=4000)))

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_truncated_file_is_refused(self, tmp_path: Path, kind: Kind) -> None:
        one = {"Leber": blobs()["Leber"]}
        whole = write_seg(tmp_path / "s.dcm", one, GRID, kind=kind).read_bytes()
        check_truncations_are_refused(tmp_path / "cut.dcm", whole[:-1])  # the last byte only pads an odd length

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data(), st.sampled_from([("binary", None), ("labelmap", None), ("fractional", RLELossless)]))
    def test_a_damaged_file_is_read_or_refused(
        self, tmp_path: Path, data: st.DataObject, kind: tuple[Kind, UID | None]
    ) -> None:
        path = tmp_path / "s.dcm"
        write_seg(path, blobs(), GRID, kind=kind[0], syntax=kind[1] or ExplicitVRLittleEndian, sop_uids=list("1234"))
        if found := read_damaged(path, data):
            assert all(r.mask.any() for s in found.structures for r in s.rasters)


def grid_of(image: sitk.Image) -> Geometry:
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3] = directions[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    i, j, k = image.GetSize()
    return Geometry((k, j, i), affine)


class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "nrrds", "segments"),
        [
            ("liver.dcm", ["liver_seg.nrrd"], {"Liver": 1}),
            ("24x38x3/seg/label.seg", ["24x38x3/nrrd/label.nrrd"], {"Liver": 1}),
            ("23x38x3/seg/label.seg", ["23x38x3/nrrd/label.nrrd"], {"Liver": 1}),
            ("sparse-labelmap-noppv.dcm", ["sparse_labelmap_noppv_seg.nrrd"], {"Liver": 1}),
            ("sparse-labelmap-ppv5.dcm", ["sparse_labelmap_ppv5_seg.nrrd"], {"Liver": 1}),
            (
                "partial_overlaps.dcm",
                [f"partial_overlaps-{n}.nrrd" for n in (1, 2, 3)],
                {"GREEN": 1, "ORANGE": 2, "PURPLE": 3, "LIGHT_BLUE": 4, "DARK_BLUE": 5},
            ),
        ],
    )
    def test_files_of_dcmqi_have_the_voxels_of_its_nrrd_files(
        self, data: Path, name: str, nrrds: list[str], segments: dict[str, int]
    ) -> None:
        images = [sitk.ReadImage(str(data / "dcmqi-seg" / name)) for name in nrrds]
        grid = grid_of(images[0])
        found = read(data / "dcmqi-seg" / name)
        masks = {
            name: np.any([sitk.GetArrayFromImage(image) == value for image in images], axis=0)
            for name, value in segments.items()
        }
        assert all(mask.any() for mask in masks.values())
        check(found, masks, grid)
        assert found.notes == ()

    @pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
    @pytest.mark.parametrize(
        "name", ["binary", "binary_fractional", "binary_overlap", "binary_single_frame", "true_fractional"]
    )
    def test_files_of_highdicom_have_the_pixels_that_pydicom_reads(
        self, data: Path, name: str, threshold: float
    ) -> None:
        path = data / "highdicom-seg" / f"seg_image_ct_{name}.dcm"
        ds = pydicom.dcmread(path)
        pixels = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
        pixels = pixels / ds.MaximumFractionalValue >= threshold if "fractional" in name else pixels > 0
        found = read(path, threshold)
        assert [s.name for s in found.structures] == [str(s.SegmentLabel) for s in ds.SegmentSequence]
        left = {(s.name, r.geometry.origin_mm): r for s in found.structures for r in s.rasters if r.geometry}
        for frame, group in zip(pixels, ds.PerFrameFunctionalGroupsSequence, strict=True):
            number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            x, y, z = (float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient)
            raster = left.pop((found.structures[number - 1].name, (x, y, z)), None)
            whole = np.zeros_like(frame, dtype=bool)
            if raster is not None:
                rows, columns = raster.mask.shape
                whole[raster.row : raster.row + rows, raster.column : raster.column + columns] = raster.mask
                measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
                assert raster.geometry is not None
                assert raster.geometry.spacing_mm[1:] == pytest.approx([float(v) for v in measures.PixelSpacing])
            np.testing.assert_array_equal(whole, frame)
        assert not left
        assert found.series_uids == (ds.ReferencedSeriesSequence[0].SeriesInstanceUID,)
        assert found.frame_of_reference_uid == ds.FrameOfReferenceUID


class TestLimits:
    def test_too_many_painted_pixels_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = {"a": np.ones(GRID.shape, dtype=bool)}
        path = write_seg(tmp_path / "s.dcm", full, GRID)
        monkeypatch.setattr(seg, "MOST_PAINTED", 4 * 63)
        check(read(path), full)
        monkeypatch.setattr(seg, "MOST_PAINTED", 4 * 63 - 1)
        assert "more than 251 pixels, up to frame 4" in refused(path)

    def test_deflated_files_that_expand_too_much_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_seg(tmp_path / "s.dcm", blobs(), GRID, syntax=DeflatedExplicitVRLittleEndian)
        monkeypatch.setattr(dicom_objects, "MOST_INFLATED_BYTES", 1000)
        assert "larger than 1000 bytes" in refused(path)

    def test_files_of_too_many_elements_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dicom_objects, "MOST_READS", 1000)
        (tmp_path / "zeros").write_bytes(bytes(100_000))
        assert "more than 1000 elements" in refused(tmp_path / "zeros")

    def test_run_lengths_of_single_bits_are_refused(self, tmp_path: Path) -> None:
        def single(ds: Dataset) -> None:
            ds.BitsAllocated = ds.BitsStored = 1
            ds.HighBit = 0

        path = write_seg(tmp_path / "s.dcm", blobs(), GRID, bits=8, syntax=RLELossless, change=single)
        assert "run lengths of single bits" in refused(path)
