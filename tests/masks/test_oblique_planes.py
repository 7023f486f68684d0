"""Segmentation images whose frames are not parallel to the slices, and the thickness of frames.

Expected values are those of the nearest voxel of the segmentation's own grid, computed for the centre of every voxel of
the series by inverting affines, or are counted by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset
from segmentations import write_rtstruct, write_seg
from test_convert_masks import LEFT, RAW, Ct, square

import gpuprep
from gpuprep import Masks
from gpuprep.core.geometry import Geometry
from gpuprep.core.mask_options import ReadingOptions
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.stack import Stack, stack
from gpuprep.masks.formats.dicom_objects import read_object
from gpuprep.masks.place_on_slices import place
from gpuprep.testing import write_series

SHAPE = (9, 22, 20)
SPACING = (2.5, 0.9, 0.8)
MIDDLE = np.array([-93.0, -111.0, -290.0])
"""Point in the series, in mm, off all symmetry planes."""


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    write_series(folder, np.zeros(SHAPE, np.int16), SPACING)
    return folder


@pytest.fixture(scope="module")
def stacked(series: Path) -> Stack:
    return stack(gpuprep.discover(series)[0])


def rotation(degrees: float, axis: int) -> NDArray[np.float64]:
    """Return the matrix of a rotation about x, y or z."""
    matrix = np.eye(3)
    a, b = (n for n in range(3) if n != axis)
    matrix[a, a] = matrix[b, b] = np.cos(np.deg2rad(degrees))
    matrix[a, b], matrix[b, a] = -np.sin(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return matrix


def grid(turn: NDArray[np.float64], shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Geometry:
    """Return a rotated grid with its centre at `MIDDLE`; without rotation, its axes are z, y and x."""
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.eye(3)[::-1].T * spacing
    affine[:3, 3] = MIDDLE - affine[:3, :3] @ (np.array(shape) / 2)
    return Geometry(shape, affine)


def indices_in(own: Geometry, series: Geometry) -> NDArray[np.float64]:
    """Return the index in grid `own`, with fractions, of the centre of each voxel of a series, shape (k, j, i, 3)."""
    k, j, i = np.indices(series.shape)
    points = np.stack([k, j, i, np.ones_like(k)], axis=-1) @ (np.linalg.inv(own.affine) @ series.affine).T
    return np.round(points[..., :3], 6)


def nearest(volume: NDArray[np.bool_], own: Geometry, series: Geometry) -> NDArray[np.bool_]:
    """Return for each voxel of a series the value of the nearest voxel of a volume; False outside of the volume."""
    index = np.floor(indices_in(own, series) + 0.5).astype(int)
    inside = ((index >= 0) & (index < volume.shape)).all(axis=-1)
    found = np.zeros(series.shape, dtype=bool)
    found[inside] = volume[tuple(index[inside].T)]
    return found


def painted(path: Path, stacked: Stack) -> tuple[dict[str, NDArray[np.bool_]], list[str]]:
    """Return the masks of a file on a series by structure, and the notes."""
    structures, notes = place(read_object(str(path), ReadingOptions()), stacked, ReadingOptions())
    masks = {}
    for structure in structures:
        mask = np.zeros((len(stacked.slices), *stacked.matrix), dtype=bool)
        for n in structure.parts:
            within, part = structure.paint(n, stacked.matrix)
            mask[n][within] = part
        masks[structure.name] = mask
    return masks, notes


ROTATIONS = {
    "sagittal": rotation(90, 1) @ rotation(90, 0),
    "coronal": rotation(-90, 0),
    "7-degrees": rotation(7, 0),
    "30-degrees": rotation(30, 0),
    "80-degrees": rotation(80, 1),
    "doubly": rotation(37, 0) @ rotation(-21, 1) @ rotation(13, 2),
}


class TestNotParallel:
    @pytest.mark.parametrize("turn", ROTATIONS.values(), ids=ROTATIONS)
    @pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "full"])
    def test_each_voxel_has_the_value_of_the_nearest_voxel_of_the_segmentation(
        self, tmp_path: Path, stacked: Stack, turn: NDArray[np.float64], sparse: bool
    ) -> None:
        own = grid(turn, (14, 15, 16), (1.1, 1.0, 0.7))
        volume = np.random.default_rng(1).random(own.shape) < 0.4
        volume[4:7] = False  # empty frames, which a sparse file omits
        solid = np.zeros(own.shape, dtype=bool)
        solid[2:12, 4:11, 5:13] = True
        path = write_seg(tmp_path / "s.dcm", {"noise": volume, "solid": solid}, own, sparse=sparse)
        masks, notes = painted(path, stacked)
        for name, expected in (("noise", volume), ("solid", solid)):
            assert nearest(expected, own, stacked.geometry).sum() > 100
            np.testing.assert_array_equal(masks[name], nearest(expected, own, stacked.geometry))
        assert notes == []

    @given(
        st.tuples(*[st.floats(-180, 180)] * 3),
        st.tuples(*[st.floats(0.4, 4)] * 3),
        st.integers(0, 2**32),
    )
    @example(
        angles=(0.0, 1.0, 0.0), spacing=(3.375, 1.0, 2.0), seed=0
    )  # a frame beyond the end reaches the first slice
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_random_orientations_and_spacings_give_the_nearest_voxel(
        self, tmp_path: Path, stacked: Stack, angles: Any, spacing: Any, seed: int
    ) -> None:
        turn = rotation(angles[0], 0) @ rotation(angles[1], 1) @ rotation(angles[2], 2)
        own = grid(turn, (9, 12, 12), spacing)
        rise = np.abs((np.linalg.inv(stacked.geometry.affine) @ own.affine)[0, 1:3]).sum() * 11
        assume(rise > 0.11)  # frames parallel to the slices fill all slices within their thickness instead
        volume = np.random.default_rng(seed).random(own.shape) < 0.5
        masks, _ = painted(write_seg(tmp_path / "s.dcm", {"a": volume}, own), stacked)
        fraction = np.abs(indices_in(own, stacked.geometry) % 1 - 0.5)
        clear = (fraction > 1e-4).all(axis=-1)  # half-way between two voxels, both values are right
        np.testing.assert_array_equal(masks["a"][clear], nearest(volume, own, stacked.geometry)[clear])

    @pytest.mark.parametrize("end", [0, -1], ids=["first-slice", "last-slice"])
    def test_a_tilted_frame_whose_middle_lies_beyond_the_stack_covers_slices_within_its_thickness(
        self, tmp_path: Path, stacked: Stack, end: int
    ) -> None:
        # One frame, 8 mm thick and tilted by 2°, whose middle is 3 mm (1.2 layers) beyond the first or the last slice.
        own = grid(rotation(2, 1), (1, 30, 30), (8.0, 1.0, 1.0))
        affine = own.affine.copy()
        affine[2, 3] += stacked.geometry.affine[2, 3] + (8 * 2.5 + 3 if end else -3) - MIDDLE[2]
        own = Geometry(own.shape, affine)
        # Origins are voxel centres, and `grid` puts the edge of the frame's only layer half a voxel lower.
        own = Geometry(own.shape, affine + np.pad(own.affine[:3, :1] / 2, ((0, 1), (3, 0))))
        volume = np.ones(own.shape, dtype=bool)
        masks, notes = painted(write_seg(tmp_path / "s.dcm", {"a": volume}, own), stacked)
        expected = nearest(volume, own, stacked.geometry)
        assert expected[end].all()
        assert not expected[4].any()
        np.testing.assert_array_equal(masks["a"], expected)
        assert notes == []

    def test_a_pixel_of_a_coronal_frame_that_reaches_beyond_the_stack_covers_the_last_slice(
        self, tmp_path: Path, stacked: Stack
    ) -> None:
        # One pixel, 6 mm high: its centre is 2 mm (0.8 layers) above the last slice, its lower edge 1 mm below it.
        affine = np.eye(4)
        top_mm = stacked.geometry.affine[2, 3] + 8 * 2.5
        affine[:3, :3] = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]]) @ np.diag([1.5, 6.0, 20.0])
        affine[:3, 3] = [MIDDLE[0], MIDDLE[1], top_mm + 2]
        own = Geometry((1, 1, 1), affine)
        volume = np.ones(own.shape, dtype=bool)
        masks, notes = painted(write_seg(tmp_path / "s.dcm", {"a": volume}, own), stacked)
        expected = nearest(volume, own, stacked.geometry)
        assert expected[8].sum() > 10
        assert not expected[:8].any()
        np.testing.assert_array_equal(masks["a"], expected)
        assert notes == []

    def test_sagittal_frames_of_a_label_map_may_have_any_order(self, tmp_path: Path, stacked: Stack) -> None:
        def reverse(ds: Dataset) -> None:
            frames = np.frombuffer(ds.PixelData, np.uint8).reshape(-1, ds.Rows, ds.Columns)
            ds.PixelData = frames[::-1].tobytes()
            ds.PerFrameFunctionalGroupsSequence = list(ds.PerFrameFunctionalGroupsSequence)[::-1]

        own = grid(ROTATIONS["sagittal"], (10, 12, 14), (0.8, 1.1, 0.9))
        masks = {"a": np.zeros(own.shape, bool), "b": np.zeros(own.shape, bool)}
        masks["a"][2:5, 3:8, 4:9] = masks["b"][5:8, 3:8, 4:9] = True
        path = write_seg(tmp_path / "s.dcm", masks, own, kind="labelmap", change=reverse)
        found, _ = painted(path, stacked)
        for name, mask in masks.items():
            np.testing.assert_array_equal(found[name], nearest(mask, own, stacked.geometry))

    def test_one_sagittal_frame_covers_the_column_within_its_thickness(self, tmp_path: Path, stacked: Stack) -> None:
        # The frame lies in the middle of column 7, is 0.8 mm thick, and covers slices 2 to 5 and rows 3 to 9.
        def forget(ds: Dataset) -> None:
            del ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices

        affine = np.eye(4)
        affine[:3, :3] = np.array([[SPACING[2], 0, 0], [0, 0, SPACING[1]], [0, SPACING[0], 0]])
        affine[:3, 3] = stacked.geometry.points_mm((2, 3, 7))
        frame = np.ones((1, 4, 7), dtype=bool)
        path = write_seg(tmp_path / "s.dcm", {"a": frame}, Geometry(frame.shape, affine), change=forget)
        expected = np.zeros(SHAPE, dtype=bool)
        expected[2:6, 3:10, 7] = True
        np.testing.assert_array_equal(painted(path, stacked)[0]["a"], expected)

    def test_unevenly_spaced_frames_extend_half_way_to_their_neighbours(self, tmp_path: Path, stacked: Stack) -> None:
        # Sagittal frames on columns 2, 4, 7, 9 and 11. Between 4 and 7, column 5 is nearer to 4, and column 6 to 7.
        columns = [2, 4, 7, 9, 11]

        def move(ds: Dataset) -> None:
            measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            measures.SpacingBetweenSlices = measures.SliceThickness = "1.68"
            for group, column in zip(ds.PerFrameFunctionalGroupsSequence, columns, strict=True):
                position = stacked.geometry.points_mm((0, 0, column - 0.1))
                group.PlanePositionSequence[0].ImagePositionPatient = [round(v, 6) for v in position]

        affine = np.eye(4)
        affine[:3, :3] = np.array([[SPACING[2], 0, 0], [0, 0, SPACING[1]], [0, SPACING[0], 0]])
        frames = np.zeros((5, 9, 22), dtype=bool)
        frames[:, 2:6, 3:10] = True
        frames[3] = False
        path = write_seg(tmp_path / "s.dcm", {"a": frames}, Geometry(frames.shape, affine), sparse=False, change=move)
        found = painted(path, stacked)[0]["a"]
        assert np.flatnonzero(found.any(axis=(0, 1))).tolist() == [1, 2, 3, 4, 5, 6, 7, 10, 11]
        np.testing.assert_array_equal(found[2:6, 3:10, [2, 5, 6, 11]], True)

    def test_slices_of_a_tilted_series_are_sampled_at_their_true_positions(self, tmp_path: Path) -> None:
        def tilt(ds: Dataset, k: int) -> None:
            ds.ImagePositionPatient = [-100.0, -120.0 + 0.7 * k, -300.0 + 2.5 * k]

        write_series(tmp_path / "in", np.zeros(SHAPE, np.int16), SPACING, change=tilt)
        stacked = stack(gpuprep.discover(tmp_path / "in")[0], Rules(policy="fix"))
        own = grid(ROTATIONS["coronal"], (16, 14, 15), (1.03, 1.1, 0.9))
        volume = np.random.default_rng(2).random(own.shape) < 0.5
        found = painted(write_seg(tmp_path / "s.dcm", {"a": volume}, own), stacked)[0]["a"]
        for k in range(SHAPE[0]):
            affine = np.array(
                [[0, 0, 0.8, -100], [0, 0.9, 0, -120 + 0.7 * k], [2.5, 0, 0, -300 + 2.5 * k], [0, 0, 0, 1]]
            )
            expected = nearest(volume, own, Geometry((1, *SHAPE[1:]), affine))
            np.testing.assert_array_equal(found[k], expected[0])


class TestThicknessOfAFrame:
    """Overlapping slices, 5 mm thick every 2.5 mm: a frame that was painted on slice 4 covers slice 4 only."""

    def write(
        self,
        path: Path,
        stacked: Stack,
        planes: dict[int, float],
        sop_uids: list[str] | None,
        change: Callable[[Dataset], None] | None = None,
        own: Geometry | None = None,
    ) -> Path:
        """Write 4 × 5 pixels on some slices, with a thickness of 5 mm and no spacing between slices."""

        def thick(ds: Dataset) -> None:
            measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            measures.SliceThickness = "5.0"
            del measures.SpacingBetweenSlices
            if change:
                change(ds)

        own = own or stacked.geometry
        mask = np.zeros(own.shape, dtype=bool)
        mask[list(planes), 10:14, 3:8] = True
        return write_seg(path, {"a": mask}, own, sop_uids=sop_uids or (), change=thick)

    def voxels(self, path: Path, stacked: Stack) -> dict[int, int]:
        mask = painted(path, stacked)[0]["a"]
        return {k: int(plane.sum()) for k, plane in enumerate(mask) if plane.any()}

    def uids(self, stacked: Stack) -> list[str]:
        return [header.sop_instance_uid for header in stacked.slices]

    @pytest.mark.parametrize("slices", [[4], [4, 6], [2, 4, 7], [3, 4, 5]], ids=str)
    def test_a_frame_covers_only_the_image_it_was_painted_on(
        self, tmp_path: Path, stacked: Stack, slices: list[int]
    ) -> None:
        path = self.write(tmp_path / "s.dcm", stacked, dict.fromkeys(slices, 0), self.uids(stacked))
        assert self.voxels(path, stacked) == dict.fromkeys(slices, 20)

    def test_the_source_image_overrules_a_wrong_spacing(self, tmp_path: Path, stacked: Stack) -> None:
        def state(ds: Dataset) -> None:
            ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = "5.0"

        path = self.write(tmp_path / "s.dcm", stacked, {4: 0}, self.uids(stacked), state)
        assert self.voxels(path, stacked) == {4: 20}

    def test_a_frame_without_source_image_on_the_pixels_of_a_slice_covers_that_slice(
        self, tmp_path: Path, stacked: Stack
    ) -> None:
        assert self.voxels(self.write(tmp_path / "s.dcm", stacked, {4: 0}, None), stacked) == {4: 20}

    def test_without_source_image_a_stated_spacing_is_the_extent_of_a_frame(
        self, tmp_path: Path, stacked: Stack
    ) -> None:
        def state(ds: Dataset) -> None:
            ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices = "5.0"

        assert self.voxels(self.write(tmp_path / "s.dcm", stacked, {4: 0}, None, state), stacked) == {
            3: 20,
            4: 20,
            5: 20,
        }

    def test_a_frame_painted_on_a_thick_slice_of_another_series_fills_the_thin_ones(
        self, tmp_path: Path, stacked: Stack
    ) -> None:
        path = self.write(tmp_path / "s.dcm", stacked, {4: 0}, [f"1.2.3.{n}" for n in range(SHAPE[0])])
        assert set(self.voxels(path, stacked)) == {3, 4, 5}

    def test_a_frame_derived_from_several_images_has_its_stated_thickness(self, tmp_path: Path, stacked: Stack) -> None:
        def several(ds: Dataset) -> None:
            images = ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence
            for group in ds.PerFrameFunctionalGroupsSequence:
                group.DerivationImageSequence[0].SourceImageSequence = images[3:6]

        path = self.write(tmp_path / "s.dcm", stacked, {4: 0}, self.uids(stacked), several)
        assert set(self.voxels(path, stacked)) == {3, 4, 5}

    def test_thick_frames_side_by_side_fill_all_thin_slices(self, tmp_path: Path, stacked: Stack) -> None:
        # Frames half-way between slices, at 0.5, 2.5, 4.5 and 6.5.
        affine = stacked.geometry.affine.copy()
        affine[:3, 3] += affine[:3, 0] / 2
        affine[:3, 0] *= 2
        own = Geometry((4, *SHAPE[1:]), affine)
        path = self.write(tmp_path / "s.dcm", stacked, {1: 0, 2: 0}, None, own=own)
        assert self.voxels(path, stacked) == {2: 20, 3: 20, 4: 20, 5: 20}

    def test_a_frame_painted_on_a_frame_of_an_enhanced_image_covers_that_frame(
        self, tmp_path: Path, stacked: Stack
    ) -> None:
        # All slices are frames of one image, so the position decides which of them it was painted on.
        one = replace(stacked, slices=tuple(s._replace(sop_instance_uid="1.2.99") for s in stacked.slices))

        def number(ds: Dataset) -> None:
            for group in ds.PerFrameFunctionalGroupsSequence:
                group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber = 5

        path = self.write(tmp_path / "s.dcm", one, {4: 0}, ["1.2.99"] * SHAPE[0], number)
        assert self.voxels(path, one) == {4: 20}


class TestMasksWithoutVoxels:
    def convert(self, tmp_path: Path, masks: Any, recipe: gpuprep.Recipe = RAW) -> Any:
        run = gpuprep.convert(tmp_path / "dicom", tmp_path / "out", recipe, masks=masks, backend="cpu")
        return run.results[0]

    @pytest.mark.parametrize("turn", ["sagittal", "parallel"])
    @pytest.mark.parametrize("layout", ["labels", "per-roi"])
    def test_a_segmentation_outside_of_its_series_rejects_the_series(
        self, tmp_path: Path, turn: str, layout: Any
    ) -> None:
        ct = Ct(tmp_path / "dicom" / "p")
        own = grid(ROTATIONS.get(turn, np.eye(3)), (8, 9, 10), (1.0, 1.0, 1.0))  # 100 mm away
        volume = np.ones(own.shape, bool)
        path = write_seg(tmp_path / "seg.dcm", {"tumour": volume}, own, series_uid=ct.uid, frame_uid=ct.frame_uid)
        result = self.convert(tmp_path, path, replace(RAW, masks=Masks(layout=layout)))
        assert (result.status, result.codes) == ("rejected", ("mask-empty",))
        assert "seg.dcm: none of 1 structure (tumour) of it covers a voxel of the series" in result.reason
        assert not (tmp_path / "out" / "p").exists()

    def test_outlines_between_pixel_centres_or_off_the_slices_reject_the_series(self, tmp_path: Path) -> None:
        ct = Ct(tmp_path / "dicom" / "p")
        rois = {"dot": [square(2, 4.6, 4.9)], "far": [square(40)], "empty": []}
        path = write_rtstruct(tmp_path / "rs.dcm", rois, series_uid=ct.uid, frame_uid=ct.frame_uid)
        result = self.convert(tmp_path, path)
        assert (result.status, result.codes) == ("rejected", ("mask-empty",))
        assert "rs.dcm: none of 2 structures (dot, far)" in result.reason

    def test_one_file_of_two_without_voxels_rejects_the_series(self, tmp_path: Path) -> None:
        ct = Ct(tmp_path / "dicom" / "p")
        good = write_rtstruct(tmp_path / "good.dcm", {"a": LEFT}, series_uid=ct.uid, frame_uid=ct.frame_uid)
        bad = write_rtstruct(tmp_path / "bad.dcm", {"b": [square(40)]}, series_uid=ct.uid, frame_uid=ct.frame_uid)
        result = self.convert(tmp_path, [good, bad])
        assert (result.status, result.codes) == ("rejected", ("mask-empty",))
        assert "bad.dcm: none of 1 structure (b)" in result.reason

    def test_one_structure_without_voxels_among_others_is_left_out_with_a_warning(self, tmp_path: Path) -> None:
        ct = Ct(tmp_path / "dicom" / "p")
        rois = {"a": LEFT, "b": [square(40)]}
        path = write_rtstruct(tmp_path / "rs.dcm", rois, series_uid=ct.uid, frame_uid=ct.frame_uid)
        result = self.convert(tmp_path, path)
        assert result.status == "ok"
        assert "b: it covers no voxel" in " ".join(result.warnings)

    def test_a_file_without_contours_is_no_error(self, tmp_path: Path) -> None:
        ct = Ct(tmp_path / "dicom" / "p")
        path = write_rtstruct(tmp_path / "rs.dcm", {"a": []}, series_uid=ct.uid, frame_uid=ct.frame_uid)
        result = self.convert(tmp_path, path)
        assert (result.status, result.labels) == ("ok", ())
        assert "nothing is drawn on it: no masks are written" in " ".join(result.warnings)

    def test_a_structure_that_resampling_loses_rejects_the_series(self, tmp_path: Path) -> None:
        ct = Ct(tmp_path / "dicom" / "p")
        dot = {"dot": [square(1, 4.5, 5.5)]}
        path = write_rtstruct(tmp_path / "rs.dcm", dot, series_uid=ct.uid, frame_uid=ct.frame_uid)
        result = self.convert(tmp_path, path, gpuprep.Recipe(spacing_mm=(2, 5, 5), size=None))
        assert (result.status, result.codes) == ("rejected", ("mask-empty",))
        assert "none of 1 structure (dot) has a voxel left on the grid of the output, of 1 voxel" in result.reason

    def test_frames_outside_of_the_stack_are_counted_in_a_note(self, tmp_path: Path, stacked: Stack) -> None:
        # Frames rotated by 60 degrees rise beyond the top of the series.
        own = grid(rotation(60, 0), (60, 6, 6), (1.0, 1.0, 1.0))
        volume = np.ones(own.shape, bool)
        _, notes = painted(write_seg(tmp_path / "s.dcm", {"a": volume}, own), stacked)
        edges = (-0.5, 5.5)
        corners = np.array([(f + d, r, c) for f in range(60) for d in (-0.5, 0.5) for r in edges for c in edges])
        k = (own.points_mm(corners)[:, 2] - stacked.geometry.origin_mm[2]) / SPACING[0]
        k = k.reshape(60, 8)
        beyond = int(((k.max(axis=1) < -0.001) | (k.min(axis=1) > SHAPE[0] - 1 + 0.001)).sum())
        assert beyond > 2
        assert notes == [f"a: {beyond} frames left out: on no slice of the series"]


def test_a_volume_written_by_highdicom_has_the_voxels_that_highdicom_computes(
    tmp_path: Path, series: Path, stacked: Stack
) -> None:
    hd = pytest.importorskip("highdicom")
    from pydicom.sr.codedict import codes

    own = grid(rotation(25, 0) @ rotation(90, 1), (12, 13, 14), (1.3, 1.2, 0.9))
    values = np.zeros(own.shape, np.uint8)
    values[2:9, 3:11, 4:12] = np.random.default_rng(5).random((7, 8, 8)) < 0.7
    volume = hd.Volume(values, own.affine, "PATIENT")
    images = [pydicom.dcmread(f) for f in sorted(series.iterdir())]
    for image in images:
        for keyword in ("PatientSex", "PatientBirthDate", "StudyID", "AccessionNumber", "StudyDate", "StudyTime"):
            setattr(image, keyword, getattr(image, keyword, ""))
        image.PositionReferenceIndicator = image.ReferringPhysicianName = ""
    described = hd.seg.SegmentDescription(
        1, "a", codes.SCT.Tissue, codes.SCT.Bone, hd.seg.SegmentAlgorithmTypeValues.MANUAL
    )
    written = hd.seg.Segmentation(
        images, volume, "BINARY", [described], "1.2.3.4", 9, "1.2.3.5", 1, "m", "m", "1", "1", omit_empty_frames=True
    )
    written.save_as(tmp_path / "s.dcm")
    written._db_con.close()  # highdicom leaves its database open, of which Python would warn in a later test
    index = volume.map_reference_to_indices(stacked.geometry.points_mm(np.argwhere(np.ones(SHAPE))))
    index = np.floor(np.round(index, 6) + 0.5).astype(int)
    inside = ((index >= 0) & (index < own.shape)).all(axis=1)
    expected = np.zeros(len(index), dtype=bool)
    expected[inside] = values[tuple(index[inside].T)] > 0
    assert expected.sum() > 100
    np.testing.assert_array_equal(painted(tmp_path / "s.dcm", stacked)[0]["a"], expected.reshape(SHAPE))
