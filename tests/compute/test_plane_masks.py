"""Morphology of boolean volumes, compared with SciPy."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy import ndimage

from gpuprep.compute.plane_masks import between, dilated, in_cells, of_cells, opened, parts

MASKS = arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=9))


@given(mask=MASKS, size=st.integers(1, 6), axis=st.integers(0, 2))
def test_opening_equals_scipy_beyond_whose_border_the_mask_continues(
    mask: NDArray[np.bool_], size: int, axis: int
) -> None:
    line = np.ones([size if a == axis else 1 for a in range(3)], dtype=bool)
    beyond = [(8, 8) if a == axis else (0, 0) for a in range(3)]
    whole = ndimage.binary_opening(np.pad(mask, beyond, constant_values=True), line)
    inner = tuple(slice(low, low + n) for (low, _), n in zip(beyond, mask.shape, strict=True))
    np.testing.assert_array_equal(opened(mask, size, axis), whole[inner])


@given(mask=MASKS, axis=st.integers(0, 2))
def test_dilation_equals_scipy(mask: NDArray[np.bool_], axis: int) -> None:
    line = np.ones([3 if a == axis else 1 for a in range(3)], dtype=bool)
    np.testing.assert_array_equal(dilated(mask, axis), ndimage.binary_dilation(mask, line))


def test_between_is_from_the_first_to_the_last_voxel() -> None:
    mask = np.array([[[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]], dtype=bool)
    expected = [[[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]]
    assert between(mask, 2).astype(int).tolist() == expected


def test_cells_have_four_voxels_and_fewer_at_an_odd_border() -> None:
    mask = np.array([[[1, 1, 0], [0, 1, 1], [1, 0, 1]]], dtype=bool)
    assert in_cells(mask, 1).astype(int).tolist() == [[[1, 1], [1, 1]]]
    assert in_cells(mask, 2).astype(int).tolist() == [[[1, 0], [0, 0]]]
    cells = np.array([[[1, 0], [0, 1]]], dtype=bool)
    assert of_cells(cells, mask.shape).astype(int).tolist() == [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]


def test_parts_have_labels_and_sizes() -> None:
    labels, sizes = parts(np.array([[[1, 1, 0, 1], [0, 1, 0, 1]]], dtype=bool))
    assert labels.tolist() == [[[1, 1, 0, 2], [0, 1, 0, 2]]]
    assert sizes.tolist() == [0, 3, 2]
