"""Tests with real, public series, if present: verdict and geometry of each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

import gpuprep
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.audit import Audit, audit
from gpuprep.dicom.read import PixelReader

OK, FIXED, REJECTED = "ok", "fixed", "rejected"
CT1, CT2 = "1.3.6.1.4.1.5962.1.3.1.1.20040826185059.5457", "1.3.6.1.4.1.5962.1.3.2.1.20040826185059.5457"
PERFUSION = "1.3.6.1.4.1.5962.1.3.10.3.1166562673.14401"
HEAD_WITH_GAP = "1.3.6.1.4.1.5962.1.1.0.0.0.1196530851.28319.0.2"

SERIES: dict[str, dict[str, tuple[Any, ...]]] = {
    # folder: UID → verdict, codes, images; and for what is stacked: slices, spacing along them in mm, orientation
    "d2n-failing": {
        "1.2.826.0.1.3680043.8.498.172569766509356512040321185": (FIXED, ["tilt"], 4, 4, 4.8515, "axial SPL"),
        "1.2.826.0.1.3680043.8.498.12055911408007578160432651861615759294": (REJECTED, ["one-position"], 4),
        "1.2.826.0.1.3680043.8.498.172569766509356227417197937": (REJECTED, ["gap"], 4),
        "1.2.826.0.1.3680043.8.498.13264727539707046196095999688458856228": (REJECTED, ["gap"], 4),
    },
    "monai-ct4": {HEAD_WITH_GAP: (REJECTED, ["gap"], 4)},
    "rtutils-phantom": {
        "1.2.826.0.1.3680043.2.1125.20210721.1101329": (REJECTED, ["rescale-type"], 4),
        "2.16.840.1.114362.1.11940992.23790159890.563423471.893.88": (OK, [], 2, 2, 5.0, "axial SPL"),
    },
    "pydicom-odd": {
        "1.3.6.1.4.1.5962.1.3.1.1.20040119072730.12322": (REJECTED, ["one-slice"], 1),
        "1.2.276.0.7230010.3.1.3.296485376.1.1521713419.1802493": (REJECTED, ["one-position"], 2),
        "dbf60361338b6cb0d8add6f6ea34276642da945f02b34613f09188618e7d4d7b": (REJECTED, ["one-slice"], 1),
        PERFUSION: (REJECTED, ["rescale-type"], 2),
        "1.2.392.200036.9123.100.11.15002200303521616157144550003340146": (REJECTED, ["one-slice"], 1),
        "": (REJECTED, ["no-uid"], 1),
        HEAD_WITH_GAP: (REJECTED, ["gap"], 4),
        "1.3.6.1.4.1.5962.1.1.0.0.0.1194734704.16302.0.2": (REJECTED, ["localizer"], 1),
        "1.3.6.1.4.1.5962.1.1.0.0.0.1194734704.16302.0.6": (OK, [], 5, 5, 2.5, "axial SPL"),
        "1.2.826.0.1.3680043.8.498.73052100648462801855733330064330327590": (REJECTED, ["missing-tag"], 50),
    },
    "codec-ctimage": {
        CT1: (REJECTED, ["one-slice"], 1),
        CT2: (REJECTED, ["one-slice"], 1),
        "1.2.840.113619.2.30.1.1762295590.1623.978668949.890": (REJECTED, ["one-position"], 16),
        PERFUSION: (REJECTED, ["rescale-type"], 2),
    },
    "codec-ct1-ct0012": {CT1: (REJECTED, ["one-position"], 8), PERFUSION: (REJECTED, ["rescale-type"], 20)},
    "codec-htj2k": {CT1: (REJECTED, ["one-position"], 2), CT2: (REJECTED, ["one-position"], 2)},
    "lungmask-minimal": {
        "1.2.826.0.1.3680043.8.498.22032370629701851459946006816247576553": (OK, [], 2, 2, 1.0, "axial SPL"),
    },
    "dcmqi-seg": {
        "1.2.826.0.1.3680043.2.1125.1.31406211013692525450623069050794718": (REJECTED, ["rescale-type"], 3),
        "1.3.6.1.4.1.5962.99.1.3840.1409.1519964081918.1.3.3456.3456": (REJECTED, ["rescale-type"], 3),
        "1.2.826.0.1.3680043.2.1125.1.9881642883347102869241902700569139": (REJECTED, ["rescale-type"], 3),
        "1.3.6.1.4.1.5962.99.1.3840.1781.1519964048862.1.3.3456.3456": (REJECTED, ["rescale-type"], 3),
        "1.2.392.200103.20080913.113635.1.2009.6.22.21.43.10.23430.1": (OK, [], 3, 3, 1.0, "axial SPL"),
    },
}  # fmt: skip

UNREADABLE = {
    # No SOP Class UID: pydicom finds none either.
    "pydicom-odd": {"empty_charset_LEI.dcm", "meta_missing_tsyntax.dcm", "nested_priv_SQ.dcm"},
}


def audits(folder: Path, rules: Rules | None = None) -> dict[str, Audit]:
    return {series.key: audit(series, rules) for series in gpuprep.discover(folder, rules)}


CT_CLASSES = ("CT Image Storage", "Enhanced CT Image Storage", "Legacy Converted Enhanced CT Image Storage")


@pytest.mark.parametrize("folder", SERIES)
def test_every_known_series_gets_its_verdict(data: Path, folder: str) -> None:
    # Traps 4, 6, 9, 11, 41, 42.
    cohort = gpuprep.discover(data / folder)
    found: dict[str, tuple[Any, ...]] = {}
    for series in cohort:
        result = audit(series)
        found[series.series_uid] = (result.verdict, list(result.codes), len(series.slices))
        if result.stack is not None:
            geometry = result.stack.geometry
            spacing_mm = pytest.approx(geometry.spacing_mm[0], abs=1e-4)
            found[series.series_uid] += (geometry.shape[0], spacing_mm, result.measures.orientation)
    assert found == SERIES[folder]
    assert {Path(path).name for path, _ in cohort.unreadable} == UNREADABLE.get(folder, set())


@pytest.mark.parametrize("folder", SERIES)
def test_every_ct_image_of_the_catalogue_is_found(data: Path, folder: str) -> None:
    index = json.loads((data / "INDEX.json").read_text())
    (dataset,) = (d for d in index["datasets"] if d["name"] == folder)
    expected = {s["series_uid"]: s["n"] for s in dataset["series"] if s.get("sop_class") in CT_CLASSES}
    found = {
        series.series_uid: len({(s.path, s.member) for s in series.slices}) + len(series.left_out)
        for series in gpuprep.discover(data / folder)
    }
    assert {uid: n for uid, n in found.items() if uid} == {uid: n for uid, n in expected.items() if uid in found}
    missing = set(expected) - set(found) - {"", None, "None"}
    assert not missing


ASSUMED_HU: dict[str, dict[str, tuple[Any, ...]]] = {
    "rtutils-phantom": {
        "1.2.826.0.1.3680043.2.1125.20210721.1101329": (FIXED, ["studies", "duplicate"], (3, 50, 100), (4.5, 3.5, 2.5)),
    },
    "dcmqi-seg": {
        "1.2.826.0.1.3680043.2.1125.1.31406211013692525450623069050794718": (OK, [], (3, 38, 23), (2.5, 0.7, 0.7)),
        "1.3.6.1.4.1.5962.99.1.3840.1409.1519964081918.1.3.3456.3456": (OK, [], (3, 38, 23), (2.5, 0.7, 0.7)),
        "1.2.826.0.1.3680043.2.1125.1.9881642883347102869241902700569139": (OK, [], (3, 38, 24), (2.5, 0.7, 0.7)),
        "1.3.6.1.4.1.5962.99.1.3840.1781.1519964048862.1.3.3456.3456": (OK, [], (3, 38, 24), (2.5, 0.7, 0.7)),
    },
}  # fmt: skip


@pytest.mark.parametrize("folder", ASSUMED_HU)
def test_values_of_another_rescale_type_are_read_as_hu_only_with_assume_hu(data: Path, folder: str) -> None:
    # Trap 41: Rescale Type US, or none at all.
    found = audits(data / folder, Rules(assume_hu=True))
    for uid, (verdict, codes, shape, spacing_mm) in ASSUMED_HU[folder].items():
        result = found[uid]
        assert (result.verdict, list(result.codes)) == (verdict, codes)
        assert result.stack is not None
        assert result.stack.geometry.shape == shape
        assert result.stack.geometry.spacing_mm == pytest.approx(spacing_mm, abs=1e-5)


@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_a_multi_frame_conversion_equals_the_original_series(data: Path, name: str) -> None:
    recipe = Recipe(assume_hu=True, padding="keep", policy="keep")
    single, multi = (
        gpuprep.read(gpuprep.discover(data / "dcmqi-seg" / name / kind, recipe.rules)[0], recipe)
        for kind in ("image", "multiframe")
    )
    assert multi.geometry.is_close(single.geometry)
    assert np.array_equal(multi.stored, single.stored)


def single_file_series(folder: Path) -> Iterator[tuple[Path, Series]]:
    """Yield each file of a folder as a separate series."""
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        for series in gpuprep.discover(file):
            yield file, series


def frames_hu(series: Series) -> list[Any]:
    """Return every frame of a file in HU, read with the reader of whole series."""
    reader = PixelReader()
    frames = []
    for header in sorted(series.slices, key=lambda s: s.frame):
        values = np.empty((series.rows, series.columns), dtype=np.int32)
        reader.read(header, values)
        frames.append(values * (header.rescale_slope or 1) + (header.rescale_intercept or 0))
    return frames


LOSSLESS = {
    "codec-ctimage": ("CTImage.dcm", r"LittleEndian|BigEndian|Deflated|LosslessOnly|LSLossless|Process14|RLE"),
    "codec-ct1-ct0012": ("CT1_UNC.explicit_little_endian.dcm", r"CT1_UNC"),
    "codec-ct1-ct0012/encapsulated/multi-frame": ("CT0012.explicit_little_endian.dcm", r"\.57|\.70|\.80|rle"),
    "codec-htj2k": ("dicomp10/CT1_UNC", r"CT1_"),
}
"""By folder: the native file, and the pattern of lossless files with the same pixels."""


@pytest.mark.parametrize("folder", LOSSLESS)
def test_all_lossless_encodings_of_a_slice_give_the_same_hu(data: Path, folder: str) -> None:
    # Traps 23, 24, 25, 29, 30.
    plain, pattern = LOSSLESS[folder]
    ds = pydicom.dcmread(data / folder / plain)
    groups = ds.get("SharedFunctionalGroupsSequence")
    rescale = groups[0].PixelValueTransformationSequence[0] if groups else ds
    pixels = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    expected = pixels * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
    compared = 0
    for file, series in single_file_series(data / folder):
        if not re.search(pattern, file.name):
            continue
        compared += 1
        assert np.array_equal(np.array(frames_hu(series)), expected), file.name
    assert compared >= {"codec-ctimage": 8, "codec-ct1-ct0012": 8, "codec-htj2k": 2}.get(folder, 6)


@pytest.mark.parametrize("folder", ["codec-ctimage", "codec-ct1-ct0012", "codec-htj2k"])
def test_every_file_of_the_codec_sets_decodes_to_an_image(data: Path, folder: str) -> None:
    # Trap 30: pydicom has no decoder for two of the syntaxes.
    files = list(single_file_series(data / folder))
    assert len(files) == {"codec-ctimage": 19, "codec-ct1-ct0012": 18, "codec-htj2k": 4}[folder]
    for file, series in files:
        assert all(np.ptp(frame) > 500 for frame in frames_hu(series)), file
