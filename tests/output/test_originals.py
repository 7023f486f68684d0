"""The originals of an output are found again and stacked as for it, or refused with one line."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from seg_series import fails, tilted, uneven

import gpuprep
from gpuprep.core.geometry import Placement
from gpuprep.errors import InputError, NothingFoundError, OutputError, RequestError
from gpuprep.output.originals import originals
from gpuprep.output.read_volume import FinishedOutput
from gpuprep.testing import write_series

SHAPE, SPACING_MM = (12, 16, 20), (2.5, 0.8, 0.7)
SMALL = gpuprep.Recipe(size=(8, 8))


def series(folder: Path, **how: Any) -> list[Path]:
    stored = np.random.default_rng(0).integers(0, 2000, SHAPE).astype(np.int16)
    return write_series(folder, stored, SPACING_MM, **how)


def converted(tmp_path: Path, recipe: gpuprep.Recipe = SMALL, **options: Any) -> FinishedOutput:
    run = gpuprep.convert(tmp_path / "ct", tmp_path / "out", recipe, backend="cpu", **options)
    (result,) = (r for r in run.results if r.folder)
    return FinishedOutput(tmp_path / "out" / result.folder)


@pytest.mark.parametrize("change", [None, tilted, uneven])
@pytest.mark.parametrize("orient", ["native", "LPS"])
def test_slices_come_in_spatial_order_on_the_recorded_grid(tmp_path: Path, change: Any, orient: Any) -> None:
    files = series(
        tmp_path / "ct", orientation=(0, 1, 0, 0, 0, -1) if orient == "LPS" else (1, 0, 0, 0, 1, 0), change=change
    )
    output = converted(tmp_path, gpuprep.Recipe(size=(8, 8), orient=orient))
    stacked = originals(tmp_path / "ct", output)
    assert [s.path for s in stacked.slices] == [str(f) for f in files]
    source = output.sidecar["source"]
    assert list(stacked.geometry.shape) == source["shape"]
    np.testing.assert_allclose(stacked.geometry.affine, source["affine_lps"], atol=1e-9)
    assert (stacked.placement is None) == (change is None)


def test_copies_elsewhere_and_in_an_archive_are_the_originals(tmp_path: Path) -> None:
    files = series(tmp_path / "ct")
    output = converted(tmp_path)
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for n, file in enumerate(reversed(files)):
            archive.write(file, f"{n}")
    shutil.rmtree(tmp_path / "ct")
    stacked = originals(tmp_path / "export.zip", output)
    assert [s.member for s in stacked.slices] == [str(n) for n in reversed(range(len(files)))]


@pytest.mark.parametrize("n", [0, 5, 11])
def test_a_missing_image_is_found(tmp_path: Path, n: int) -> None:
    files = series(tmp_path / "ct")
    output = converted(tmp_path)
    files[n].unlink()
    fails(InputError, "11 images of series ", lambda: originals(tmp_path / "ct", output))


def test_so_many_missing_images_that_no_stack_is_left_are_an_error_of_input(tmp_path: Path) -> None:
    files = series(tmp_path / "ct")
    output = converted(tmp_path)
    for file in files[3:8]:
        file.unlink()
    fails(
        InputError, f"the originals of {output.folder} cannot be stacked: ", lambda: originals(tmp_path / "ct", output)
    )


def test_a_missing_slice_of_an_uneven_series_is_found(tmp_path: Path) -> None:
    files = series(tmp_path / "ct", change=uneven)
    output = converted(tmp_path)
    files[7].unlink()
    fails(InputError, "do not form the grid of ", lambda: originals(tmp_path / "ct", output))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda ds: setattr(ds, "ImagePositionPatient", [-99, *ds.ImagePositionPatient[1:]]), "they lie elsewhere"),
        (lambda ds: setattr(ds, "PixelSpacing", [0.9, 0.7]), "they lie elsewhere"),
    ],
)
def test_images_that_lie_elsewhere_now_are_refused(tmp_path: Path, change: Any, expected: str) -> None:
    files = series(tmp_path / "ct")
    output = converted(tmp_path)
    for file in files:
        ds = pydicom.dcmread(file)
        change(ds)
        ds.save_as(file)
    fails(InputError, expected, lambda: originals(tmp_path / "ct", output))


@pytest.mark.parametrize(
    ("change", "axis", "expected"),
    [(uneven, 2, "slices are spaced otherwise"), (tilted, 1, "slices are shifted otherwise")],
)
def test_slices_that_moved_within_the_grid_are_refused(tmp_path: Path, change: Any, axis: int, expected: str) -> None:
    files = series(tmp_path / "ct", change=change)
    output = converted(tmp_path)
    ds = pydicom.dcmread(files[5])
    ds.ImagePositionPatient[axis] += 0.1
    ds.save_as(files[5])
    fails(InputError, expected, lambda: originals(tmp_path / "ct", output))


def test_another_series_with_the_same_grid_is_not_taken(tmp_path: Path) -> None:
    series(tmp_path / "ct")
    output = converted(tmp_path)
    series(tmp_path / "other")
    key = gpuprep.discover(tmp_path / "other")[0].key
    expected = f"series {output.sidecar['key']}, are not there; there are {key}"
    fails(NothingFoundError, expected, lambda: originals(tmp_path / "other", output))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no DICOM")
    fails(NothingFoundError, "are not there", lambda: originals(tmp_path / "empty", output))
    fails(RequestError, "nowhere", lambda: originals(tmp_path / "nowhere", output))
    assert len(originals([tmp_path / "other", tmp_path / "ct"], output).slices) == SHAPE[0]


def test_a_pseudonym_is_resolved_by_the_key_alone(tmp_path: Path) -> None:
    series(tmp_path / "ct")
    key = tmp_path / "keys" / "study.key"
    key.parent.mkdir()
    names = gpuprep.Pseudonyms.load(key, tmp_path / "out")
    output = converted(tmp_path, names=names)
    expected = "names its series by a pseudonym, "
    fails(RequestError, expected, lambda: originals(tmp_path / "ct", output))
    assert len(originals(tmp_path / "ct", output, names.series).slices) == SHAPE[0]
    other = gpuprep.Pseudonyms.load(tmp_path / "keys" / "other.key", tmp_path / "out")
    fails(NothingFoundError, "are not there", lambda: originals(tmp_path / "ct", output, other.series))


@pytest.mark.parametrize("lost", ["key", "source", "placement"])
def test_an_output_without_the_record_is_refused(tmp_path: Path, lost: str) -> None:
    series(tmp_path / "ct")
    output = converted(tmp_path)
    content = json.loads((output.folder / "volume.json").read_text())
    del (content["source"] if lost == "placement" else content)[lost]
    (output.folder / "volume.json").write_text(json.dumps(content))
    again = FinishedOutput(output.folder)
    fails(OutputError, f"has no '{lost}': convert the series again", lambda: originals(tmp_path / "ct", again))
    (output.folder / "volume.json").unlink()
    fails(OutputError, "is no finished output", lambda: originals(tmp_path / "ct", FinishedOutput(output.folder)))


def test_a_placement_survives_volume_json(tmp_path: Path) -> None:
    series(tmp_path / "ct", change=tilted)
    output = converted(tmp_path)
    placement = Placement.from_dict(output.sidecar["source"]["placement"])
    assert placement.shift is not None
    spacing_mm = output.sidecar["source"]["spacing_mm"]
    np.testing.assert_allclose(np.diff(placement.shift[:, 0]) * spacing_mm[1], 0.7, atol=1e-9)
