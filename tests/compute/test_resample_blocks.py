"""Tables in blocks of outputs against the matrix from SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuprep.compute import resample_blocks, resample_matrix
from gpuprep.compute.resample_blocks import OUTPUTS, BlockTables

RULES = [("nearest", True), ("constant", False), ("mirror", True)]


def dense(tables: BlockTables) -> NDArray[np.float64]:
    """Return the matrix that the tables represent."""
    blocks, width, outputs = tables.weights.shape
    assert outputs == OUTPUTS
    matrix = np.zeros((blocks * OUTPUTS, tables.n_in))
    for block in range(blocks):
        first = int(tables.first[block])
        assert 0 <= first <= tables.n_in - width  # every sample that is read exists
        matrix[block * OUTPUTS : (block + 1) * OUTPUTS, first : first + width] = tables.weights[block].T
    return matrix[: tables.n_out]


@settings(max_examples=150)
@given(
    n=st.integers(1, 70),
    m=st.integers(1, 150),
    order=st.sampled_from([0, 1, 2, 3, 5]),
    rule=st.sampled_from(RULES),
    sigma=st.sampled_from([0.0, 0.0, 0.7]),
    flipped=st.booleans(),
)
@example(n=50, m=150, order=3, rule=("constant", False), sigma=0.0, flipped=False)  # the last output is lost
def test_tables_equal_the_matrix_from_scipy(
    n: int, m: int, order: int, rule: tuple[str, bool], sigma: float, flipped: bool
) -> None:
    step: dict[str, Any] = {"order": order, "mode": rule[0], "grid_mode": rule[1], "sigma": sigma, "along": None}
    expected = resample_matrix.matrix(n, m, blur_mode="nearest", **step)
    tables = resample_blocks.build(n, m, blur_mode="nearest", flipped=flipped, **step)
    assert (tables.n_in, tables.n_out) == (n, m)
    # An error of 3e-7 is 0.001 HU at 4000 HU. Flipped tables take the samples in reverse order.
    assert np.abs(dense(tables) - (expected[:, ::-1] if flipped else expected)).max() < 3e-7
    if not flipped:
        assert (np.diff(tables.first) >= 0).all()  # otherwise slices that were overwritten would be needed


def test_tables_of_uneven_positions_have_a_column_per_sample() -> None:
    along = (0.0, 1.0, 1.5, 3.0, 4.0, 6.0, 9.0)
    step: dict[str, Any] = {"order": 3, "mode": "nearest", "grid_mode": True, "sigma": 0.0, "along": along}
    expected = resample_matrix.matrix(10, 23, blur_mode="nearest", **step)
    tables = resample_blocks.build(10, 23, blur_mode="nearest", **step)
    assert tables.n_in == len(along)
    assert np.abs(dense(tables) - expected).max() < 3e-7


@pytest.mark.parametrize("flipped", [False, True])
def test_a_selection_takes_samples_as_they_are(flipped: bool) -> None:
    line = np.arange(100, 140)
    stored = line[::-1] if flipped else line
    tables = resample_blocks.selection(40, 5, 31, flipped=flipped)
    assert (dense(tables) @ stored).tolist() == line[5:31].tolist()


def test_a_part_has_the_outputs_and_samples_of_its_blocks() -> None:
    step: dict[str, Any] = {"order": 3, "mode": "nearest", "grid_mode": True, "sigma": 0.0, "along": None}
    whole = resample_blocks.build(108, 324, blur_mode="nearest", **step)
    part = whole.part(64, 131)
    matrix = dense(whole)
    np.testing.assert_array_equal(dense(part), matrix[64:131])
    low, high = part.samples
    used = np.flatnonzero(matrix[64:136].any(axis=0))  # whole blocks
    assert low <= used[0]
    assert used[-1] < high
    # By hand: outputs 64 to 135 lie at samples 21 to 44.8; 12 + 2 samples on either side contribute.
    assert low >= 6
    assert high <= 62
