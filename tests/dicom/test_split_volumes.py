"""Tests of grouping images into series and volumes, mostly with headers made up here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import encoded_natively
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)
from segmentations import write_rtstruct
from test_stack import header
from typer.testing import CliRunner, Result

import gpuprep
from gpuprep.cli.app import app
from gpuprep.core.mask_options import Masks
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Description, Dose, Image, Series, SliceHeader, packed
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.audit import audit
from gpuprep.dicom.header_checks import check
from gpuprep.dicom.headers import read_headers
from gpuprep.dicom.split_volumes import partition
from gpuprep.errors import InputError
from gpuprep.output.manifest import Manifest, manifest_path
from gpuprep.pipeline.pseudonyms import Pseudonyms
from gpuprep.testing import write_series

HU = Recipe(spacing_mm=None, size=None, window_hu=None)
BY_FOLDER = Rules(group_by="folder")


def image(z_mm: float, number: int, **attributes: Any) -> Image:
    """Return an axial image; `attributes` are fields of `Image` or `SliceHeader`."""
    own = {"path": f"/data/{number:04}.dcm", "instance_number": number, "sop_instance_uid": f"1.5.{number}"}
    given_: dict[str, Any] = own | attributes
    of_slice: dict[str, Any] = {name: given_.pop(name) for name in list(given_) if name in SliceHeader._fields}
    plain = Image(
        series_uid="1.3", study_uid="1.2", patient="p", frame_of_reference_uid="1.4", series_number=1, rows=16,
        columns=20, pixel_spacing_mm=(0.8, 0.7), orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), folder="/data",
        description=Description(), dose=Dose(), acquired_s=None,
        header=header("", (-100.0, -120.0, z_mm))._replace(**of_slice),
    )  # fmt: skip
    return plain._replace(**given_)


def scan(start_mm: float, count: int, first: int, step_mm: float = 2.5, **attributes: Any) -> list[Image]:
    """Return evenly spaced images, numbered from `first`; attributes may be functions of the index of the slice."""
    return [
        image(start_mm + step_mm * k, first + k, **{n: v(k) if callable(v) else v for n, v in attributes.items()})
        for k in range(count)
    ]


def instance_numbers(images: Iterable[Image], rules: Rules | None = None) -> list[list[int]]:
    """Return the instance numbers of each volume, in order."""
    return [sorted(s.instance_number or 0 for s in v.slices) for v in partition(images, rules or Rules())]


def span(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def irregularity_texts(series: Series) -> list[str]:
    return [i.what for i in series.irregularities]


# Acquisitions


@given(
    start=st.floats(0.1, 49.9), step=st.sampled_from([1.0, 2.5, 4.0]), seed=st.integers(0, 99),
    counted=st.sampled_from(["on", "alike", "by position"]),
)  # fmt: skip
def test_two_overlapping_passes_are_two_volumes(start: float, step: float, seed: int, counted: str) -> None:
    # Trap 43. The first pass has 21 slices from 0 to 50 mm.
    images = scan(0, 21, 1, acquisition_number=1) + scan(start, 21, 101, step, acquisition_number=2)
    if counted == "alike":
        images = [
            i._replace(header=i.header._replace(instance_number=(i.header.instance_number or 0) % 100)) for i in images
        ]
    if counted == "by position":  # renumbered by another program
        images.sort(key=lambda i: (i.header.position_mm or (0, 0, 0))[2])
        images = [i._replace(header=i.header._replace(instance_number=n)) for n, i in enumerate(images)]
    images = [images[n] for n in np.random.default_rng(seed).permutation(len(images))]
    volumes = partition(images, Rules())
    if counted == "by position" and step == 2.5 and abs(start % 2.5 - 1.25) < 0.03 and start < 7:
        return  # evenly spaced and numbered in order: indistinguishable from one stack
    assert [{s.acquisition_number for s in v.slices} for v in volumes] == [{1}, {2}]
    assert [len(v.slices) for v in volumes] == [21, 21]


def test_interleaved_passes_renumbered_by_position_are_two_volumes() -> None:
    images = scan(0, 21, 1, acquisition_number=1) + scan(26.25, 21, 101, acquisition_number=2)
    images.sort(key=lambda i: (i.header.position_mm or (0, 0, 0))[2])
    images = [i._replace(header=i.header._replace(instance_number=n)) for n, i in enumerate(images)]
    assert [len(v.slices) for v in partition(images, Rules())] == [21, 21]


def test_evenly_spaced_slices_numbered_in_order_stay_one_volume() -> None:
    # Slices alternate between two or four acquisition numbers.
    for share in (2, 4):
        images = [image(2.5 * k, k + 1, acquisition_number=k % share) for k in range(24)]
        assert instance_numbers(images) == [span(1, 24)]
        assert instance_numbers(images[:9] + images[10:]) == [[*span(1, 9), *span(11, 14)]]  # one slice is missing
        # Numbered by In-Stack Position Number instead.
        stacked = [image(2.5 * k, 1, path=f"{k}", in_stack=k + 1, acquisition_number=k % share) for k in range(24)]
        assert len(partition(stacked, Rules())) == 1


SEPARATING: dict[str, Any] = {
    "temporal position": lambda n: {"temporal_position": n},
    "cardiac phase": lambda n: {"phase": packed([("cardiac", f"{40 * n}")])},
    "respiratory phase": lambda n: {"phase": packed([("respiratory", f"{40 * n}")])},
    "energy": lambda n: {"phase": packed([("energy", f"{40 + 30 * n}")])},
    "series UID": lambda n: {"series_uid": f"1.3.{n}"},
    "acquisition number": lambda n: {"acquisition_number": n},
    "acquisition time": lambda n: {"acquisition_time": f"t{n}"},
    "reconstruction": lambda n: {"reconstruction": f"B{n}0"},
    "phase, number and time": lambda n: {
        "phase": packed([("cardiac", f"{40 * n}")]), "acquisition_number": n, "acquisition_time": f"t{n}",
    },
}  # fmt: skip


def renumbered_by_position(images: list[Image]) -> list[Image]:
    """Return images with new instance numbers by position."""
    images = sorted(images, key=lambda i: (i.header.position_mm or (0, 0, 0))[2])
    return [i._replace(header=i.header._replace(instance_number=n)) for n, i in enumerate(images)]


@pytest.mark.parametrize("missing", [(), ((1, 7),), ((0, 12), (1, 7)), ((1, 7), (1, 19), (1, 18))], ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", SEPARATING)
def test_alternating_acquisitions_are_split_even_if_slices_are_missing(
    name: str, count: int, missing: tuple[tuple[int, int], ...]
) -> None:
    images = [
        image(count * k + n, 100 * n + k, **SEPARATING[name](n))
        for n in range(count) for k in range(20) if (n, k) not in missing
    ]  # fmt: skip
    rules = BY_FOLDER if name == "series UID" else Rules()
    expected = [[100 * n + k for k in range(20) if (n, k) not in missing] for n in range(count)]
    assert sorted(instance_numbers(images, rules)) == expected
    for volume in partition(images, rules):
        codes = ["acquisitions"]
        numbers = sorted(s.instance_number or 0 for s in volume.slices)
        if numbers[-1] - numbers[0] >= len(numbers):
            codes.append("gap")
        assert list(audit(volume, rules).codes) == codes


@pytest.mark.parametrize("missing", [None, 7, 30])
@pytest.mark.parametrize("name", SEPARATING)
def test_slices_numbered_in_order_are_split_by_explicit_attributes_only(name: str, missing: int | None) -> None:
    images = renumbered_by_position([image(1.0 * k, k, **SEPARATING[name](k % 2)) for k in range(40) if k != missing])
    rules = BY_FOLDER if name == "series UID" else Rules()
    volumes = partition(images, rules)
    if name in ("acquisition number", "acquisition time", "reconstruction"):
        assert [len(v.slices) for v in volumes] == [40 - (missing is not None)]
    else:
        z_mm = [{int((s.position_mm or (0, 0, 0))[2]) for s in v.slices} for v in volumes]
        assert sorted(z_mm, key=min) == [set(range(0, 40, 2)) - {missing}, set(range(1, 40, 2)) - {missing}]


@pytest.mark.parametrize("seed", range(20))
def test_a_phase_that_varies_within_a_scan_does_not_split_it(seed: int) -> None:
    # As with an irregular heartbeat: 69, 70 and 71 %, by single slices or by blocks.
    rng = np.random.default_rng(seed)
    for phases in (rng.integers(69, 72, 40), np.repeat(rng.integers(69, 72, 10), 4), rng.integers(70, 72, 40)):
        images = [image(2.0 * k, k, phase=packed([("cardiac", str(p))])) for k, p in enumerate(phases)]
        assert instance_numbers(images) == [span(0, 40)]
        assert instance_numbers([i for i in images if i.header.instance_number != 17]) == [
            [*span(0, 17), *span(18, 22)]
        ]


@pytest.mark.parametrize("name", [name for name in SEPARATING if name not in ("series UID", "phase, number and time")])
def test_an_attribute_that_every_second_slice_lacks_does_not_split_a_scan(name: str) -> None:
    order = np.random.default_rng(1).permutation(24)
    images = [image(2.0 * k, int(order[k]), **(SEPARATING[name](1) if k % 2 else {})) for k in range(24)]
    if name == "reconstruction":  # Image Type is always present
        return
    assert instance_numbers(images) == [span(0, 24)]


def test_a_gap_filled_by_another_acquisition_stays_filled() -> None:
    images = scan(0, 10, 1, acquisition_number=1) + scan(32.5, 10, 11, acquisition_number=1)
    assert instance_numbers(images + scan(25, 3, 50, acquisition_number=2)) == [[*span(1, 20), *span(50, 3)]]


def test_a_step_and_shoot_scan_is_one_volume_and_its_repetition_another() -> None:
    steps = [i for n in range(8) for i in scan(10.0 * n, 4, 1 + 4 * n, acquisition_number=n)]
    assert instance_numbers(steps) == [span(1, 32)]
    assert instance_numbers([*steps, *scan(11, 4, 50, acquisition_number=9)]) == [span(1, 32), span(50, 4)]
    again = [i for n in range(8) for i in scan(10.0 * n + 0.8, 4, 101 + 4 * n, acquisition_number=n + 8)]
    assert instance_numbers([*steps, *again]) == [span(1, 32), span(101, 32)]


def test_passes_in_both_directions_are_split_if_every_slice_has_its_own_time() -> None:
    one = scan(0, 21, 1, acquisition_time=lambda k: f"a{k}")
    assert instance_numbers(one) == [span(1, 21)]
    for step in (2.5, -2.5):
        other = scan(96 if step < 0 else 46, 21, 31, step, acquisition_time=lambda k: f"b{k}")
        assert instance_numbers(one + other) == [span(1, 21), span(31, 21)]


UP_AND_DOWN = {
    "beyond the end of the first": ([0, 2, 4, 6, 8, 10, 12, 14, 16, 18], [22, 20, 18, 16, 14, 12, 10]),
    "a millimetre beyond it": ([4 * k for k in range(10)], [37 - 4 * k for k in range(10)]),
    "a millimetre before it": ([4 * k for k in range(10)], [35 - 4 * k for k in range(9)]),
    "half a step apart": ([2 * k for k in range(20)], [39 - 2 * k for k in range(20)]),
    "thirds of a step apart": (
        [6 * k for k in range(10)], [56 - 6 * k for k in range(10)], [4 + 6 * k for k in range(10)],
    ),
    "in register": ([2 * k for k in range(10)], [18 - 2 * k for k in range(10)], [2 * k for k in range(10)]),
    "one slice higher": ([2 * k for k in range(10)], [20 - 2 * k for k in range(10)]),
    "with another step": ([2 * k for k in range(11)], [19 - 4 * k for k in range(6)]),
    "far beyond it": ([2 * k for k in range(10)], [40 - 2 * k for k in range(20)]),
}  # fmt: skip


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("passes", UP_AND_DOWN.values(), ids=UP_AND_DOWN)
def test_the_slice_at_a_reversal_belongs_to_the_pass_with_its_step(
    passes: tuple[list[int], ...], mirrored: bool
) -> None:
    images = [
        image(float(-z if mirrored else z), 100 * n + k, acquisition_time=f"{n} {k}")
        for n, zs in enumerate(passes) for k, z in enumerate(zs)
    ]  # fmt: skip
    volumes = partition(images, Rules())
    assert sorted(sorted(s.instance_number or 0 for s in v.slices) for v in volumes) == [
        span(100 * n, len(zs)) for n, zs in enumerate(passes)
    ]
    assert {code for v in volumes for code in audit(v).codes} == {"acquisitions"}


def test_a_second_pass_in_the_same_direction_keeps_its_slices() -> None:
    times = {"acquisition_time": lambda k: f"{k}"}
    first, again = scan(0, 10, 1, 2.0, **times), scan(14, 10, 101, 2.0, acquisition_time=lambda k: f"b{k}")
    assert instance_numbers(first + again) == [span(1, 10), span(101, 10)]


def test_an_aborted_pass_between_the_slices_of_another_is_left_out() -> None:
    (volume,) = partition(scan(0, 21, 1, acquisition_number=1) + scan(26, 2, 31, acquisition_number=2), Rules())
    assert [s.instance_number for s in volume.slices] == span(1, 21)
    assert volume.left_out == (("0031.dcm", "other acquisition"), ("0032.dcm", "other acquisition"))
    assert [i.text for i in audit(volume).irregularities] == [
        "2 images are of other acquisitions: 0031.dcm, 0032.dcm; left out of the volume",
        "several acquisitions overlap, separated by acquisition number; this is acquisition number 1; one of "
        "them is a volume",
    ]


def test_images_of_bolus_tracking_do_not_describe_the_volume_from_which_they_are_left_out() -> None:
    tracking, spiral = Description(kernel="B20f", kvp=80.0), Description(kernel="B40f", kvp=120.0)
    images = [
        image(20.0, n, acquisition_number=n, description=tracking, dose=Dose(20.0), acquired_s=float(n))
        for n in range(1, 31)
    ]
    images += scan(0, 20, 101, 2.0, acquisition_number=99, description=spiral, dose=Dose(200.0), acquired_s=100.0)
    (volume,) = partition(images, Rules())
    assert (volume.description, volume.dose, volume.acquired_s) == (spiral, Dose(200.0), (100.0, 100.0))


@pytest.mark.parametrize("tracked", [8, 30])
@pytest.mark.parametrize("counted", ["each", "one", "none"])
@pytest.mark.parametrize("z_mm", [20.0, 21.0, 70.0])
def test_any_number_of_bolus_tracking_images_is_left_out(tracked: int, counted: str, z_mm: float) -> None:
    numbers = {"each": range(1, tracked + 1), "one": [1] * tracked, "none": [None] * tracked}[counted]
    images = [
        image(z_mm, n, acquisition_number=number, acquisition_time=f"a{n}") for n, number in enumerate(numbers, 1)
    ]
    images += scan(0, 20, 101, 2.0, acquisition_number=99, acquisition_time=lambda k: f"b{k}")
    (volume,) = partition(images, Rules())
    assert [s.instance_number for s in volume.slices] == span(101, 20)
    assert [why for _, why in volume.left_out] == ["other acquisition"] * tracked
    outcome = audit(volume)
    assert (outcome.verdict, set(outcome.codes)) == ("fixed", {"left-out", "acquisitions"})
    assert (
        f"{tracked} images are of other acquisitions: 0001.dcm, 0002.dcm, 0003.dcm and" in irregularity_texts(volume)[0]
    )
    assert audit(volume, Rules(policy="strict")).verdict == "rejected"
    (kept,) = partition(images, Rules(policy="keep"))
    assert (len(kept.slices), kept.left_out) == (20 + tracked, ())


def test_a_few_slices_of_one_acquisition_are_not_preferred_to_many_others() -> None:
    # 11 of 20 positions have acquisition number 1; all other images, at every position, have their own number.
    images = scan(0, 11, 1, 2.0, acquisition_number=1)
    images += [
        i for n in range(5) for i in scan(0, 20, 100 * n + 101, 2.0, acquisition_number=lambda k, n=n: 100 * n + k + 2)
    ]
    (volume,) = partition([i._replace(header=i.header._replace(instance_number=None)) for i in images], Rules())
    assert (len(volume.slices), audit(volume).codes) == (111, ("duplicate",))


def test_a_duplicate_image_does_not_split_a_scan_of_several_acquisitions() -> None:
    steps = [i for n in range(8) for i in scan(10.0 * n, 4, 1 + 4 * n, acquisition_number=n)]
    copy = steps[5]._replace(header=steps[5].header._replace(path="/data/copy.dcm"))
    (volume,) = partition([*steps, copy], Rules())
    assert audit(volume).codes == ("duplicate",)


def test_acquisitions_with_a_gap_between_them_are_one_volume_with_a_gap() -> None:
    (volume,) = partition(scan(0, 21, 1, acquisition_number=1) + scan(80, 21, 31, acquisition_number=2), Rules())
    assert audit(volume).codes == ("gap",)


def test_a_volume_split_by_one_attribute_may_be_split_again_by_another() -> None:
    images = [
        i
        for n, (phase, file) in enumerate((p, f) for p in (30, 70) for f in "ab")
        for i in scan(0, 6, 1 + 10 * n, phase=packed([("cardiac", str(phase))]), path=f"/data/{file}", frames=12,
                      frame=lambda k, phase=phase: k + phase)
    ]  # fmt: skip
    volumes = partition(images, Rules())
    assert sorted(sorted(s.instance_number or 0 for s in v.slices) for v in volumes) == [
        span(1, 6), span(11, 6), span(21, 6), span(31, 6),
    ]  # fmt: skip
    assert "cardiac phase 70 %" in irregularity_texts(volumes[-1])[0]
    assert "separated by instance" in irregularity_texts(volumes[-1])[1]


def test_two_attributes_together_split_acquisitions_that_neither_splits_alone() -> None:
    images = [
        i
        for n in range(4)
        for i in scan(0, 6, 1 + 10 * n, acquisition_number=n // 2, phase=packed([("energy", str(40 + n % 2 * 30))]))
    ]
    volumes = partition(images, Rules())
    assert [sorted(s.instance_number or 0 for s in v.slices) for v in volumes] == [
        span(1 + 10 * n, 6) for n in range(4)
    ]
    assert irregularity_texts(volumes[1])[0].endswith("; this is energy 70 keV and acquisition number 0")


def write_copies(
    folder: Path, copies: int, partly: int = 0, *, other: int | None = None, encoded: bool = False
) -> None:
    """Write a scan of 8 slices, and copies with other SOP Instance UIDs and times; pixels of slice `other` differ."""
    for n in range(copies + 1):
        stored = noise(0, 8)
        if n and other is not None:
            stored[other] += 1

        def change(ds: Dataset, k: int, n: int = n) -> None:
            ds.ContentTime, ds.SOPInstanceUID, ds.FrameOfReferenceUID = f"12000{n}", f"1.5.{n}.{k}", "1.4"

        files = write_series(folder / f"{n}", stored, (2.5, 0.8, 0.7), series_uid="1.2.3", change=change)
        for file in files[partly:] if partly and n else ():
            file.unlink()
        for file in files if encoded and n else ():
            if file.exists():
                ds = pydicom.dcmread(file)
                ds.compress(RLELossless, generate_instance_uid=False)
                ds.save_as(file)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(("copies", "partly"), [(1, 0), (1, 4), (2, 0), (3, 5)])
def test_copies_with_another_content_time_are_duplicates_and_not_acquisitions(
    tmp_path: Path, copies: int, partly: int, encoded: bool
) -> None:
    write_copies(tmp_path, copies, partly, encoded=encoded)
    (series,) = gpuprep.discover(tmp_path)
    assert audit(series).codes == ("duplicate",)
    volume = gpuprep.load(tmp_path, HU, backend="cpu")
    np.testing.assert_array_equal(np.asarray(volume.values), noise(0, 8) - 1024.0)


@pytest.mark.parametrize("other", [0, 3, 7])
def test_images_that_differ_in_content_time_and_one_pixel_are_two_volumes(tmp_path: Path, other: int) -> None:
    write_copies(tmp_path, 1, other=other)
    assert [len(v.slices) for v in gpuprep.discover(tmp_path)] == [8, 8]
    (unlike,) = (f for f in (tmp_path / "1").iterdir() if pydicom.dcmread(f).SOPInstanceUID == f"1.5.1.{other}")
    unlike.unlink()
    (series,) = gpuprep.discover(tmp_path)
    assert len(series.slices) == 15


def test_a_copy_of_one_of_two_acquisitions_is_its_duplicate(tmp_path: Path) -> None:
    write_copies(tmp_path, 2, other=4)
    assert [len(v.slices) for v in gpuprep.discover(tmp_path)] == [16, 8]
    assert {code for v in gpuprep.discover(tmp_path) for code in audit(v).codes} == {"duplicate", "acquisitions"}


@given(st.permutations(range(24)))
def test_volumes_do_not_depend_on_the_order_of_files(order: list[int]) -> None:
    images = scan(0, 12, 1, study_uid="1.2.9") + scan(3, 6, 13, study_uid="1.2.8", acquisition_number=1)
    images += scan(4, 6, 19, study_uid="1.2.8", acquisition_number=2)
    volumes = partition([images[n] for n in order], Rules())
    assert [(v.key, v.study_uid, len(v.slices)) for v in volumes] == [
        ("1.3#1", "1.2.8", 6), ("1.3#2", "1.2.8", 6), ("1.3#3", "1.2.9", 12),
    ]  # fmt: skip


# Studies and patients


def test_images_without_a_study_are_assigned_to_the_only_study() -> None:
    images = scan(0, 12, 1, study_uid=lambda k: "" if k < 5 else "1.2", patient=lambda k: "" if k % 3 else "p")
    (volume,) = partition(images, Rules())
    assert (len(volume.slices), volume.study_uid, volume.irregularities) == (12, "1.2", ())


def test_images_without_a_study_are_assigned_by_patient_or_folder_or_left_out() -> None:
    one = scan(0, 6, 1, study_uid=lambda k: "" if k == 2 else "1.2.1", patient="a")
    two = scan(50, 6, 11, study_uid=lambda k: "" if k == 2 else "1.2.2", patient="b")
    assert instance_numbers(one + two) == [span(1, 6), span(11, 6)]
    one, two = ([i._replace(patient="", folder=f"/data/{f}") for i in images] for f, images in (("a", one), ("b", two)))
    assert instance_numbers(one + two) == [span(1, 6), span(11, 6)]
    volumes = partition([i._replace(folder="/data") for i in one + two], Rules())
    assert [len(v.slices) for v in volumes] == [5, 5]
    assert volumes[0].left_out == (("0003.dcm", "no Study Instance UID"), ("0013.dcm", "no Study Instance UID"))
    assert [i.code for i in volumes[0].irregularities] == ["studies", "left-out"]


def test_a_damaged_study_uid_does_not_split_a_series() -> None:
    (volume,) = partition(scan(0, 12, 1, study_uid=lambda k: "malformed-0123" if k == 5 else "1.2"), Rules())
    assert (len(volume.slices), volume.study_uid, volume.irregularities) == (12, "1.2", ())


def test_a_different_study_uid_in_every_image_is_ignored() -> None:
    # As from an anonymiser that does not map equal UIDs to equal ones.
    (volume,) = partition(scan(0, 12, 1, study_uid=lambda k: f"1.2.{k}"), Rules())
    assert len(volume.slices) == 12
    assert irregularity_texts(volume) == ["12 images name 12 studies or patients"]
    assert audit(volume, Rules(policy="strict")).codes == ("studies",)
    (volume,) = partition(scan(0, 12, 1, study_uid=lambda k: f"1.2.{k // 2}"), Rules())
    assert irregularity_texts(volume) == ["12 images name 6 studies or patients"]


def test_small_groups_of_several_patients_are_not_joined() -> None:
    volumes = partition(scan(0, 12, 1, study_uid=lambda k: f"1.2.{k // 2}", patient=lambda k: f"{k // 2}"), Rules())
    assert [len(v.slices) for v in volumes] == [2] * 6


@pytest.mark.parametrize("by_folder", [False, True])
@pytest.mark.parametrize("images_each", [1, 2])
def test_patients_are_separated_if_every_image_has_its_own_study(images_each: int, by_folder: bool) -> None:
    images = [
        image(
            2.0 * k, k, study_uid=f"1.2.{k // images_each}", patient="abc"[k // 10],
            series_uid=f"1.3.{k}" if by_folder else "1.3",
        )
        for k in range(30)
    ]  # fmt: skip
    volumes = partition(images, BY_FOLDER if by_folder else Rules())
    assert [[s.instance_number for s in v.slices] for v in volumes] == [span(0, 10), span(10, 10), span(20, 10)]
    assert [i.text for i in volumes[1].irregularities] == [
        f"30 images name {30 // images_each} studies or patients; taken for one study of each patient",
        "3 patients share a series; each is a volume",
    ]


@pytest.mark.parametrize("images_each", [1, 2])
def test_a_different_patient_id_in_every_image_of_a_study_is_ignored(images_each: int) -> None:
    (volume,) = partition(scan(0, 16, 1, patient=lambda k: f"{k // images_each}"), Rules())
    assert len(volume.slices) == 16
    assert irregularity_texts(volume) == [f"16 images name {16 // images_each} studies or patients"]
    two = scan(0, 16, 1, patient=lambda k: f"{k // images_each}", study_uid=lambda k: f"1.2.{k // 8}")
    assert instance_numbers(two) == [span(1, 8), span(9, 8)]  # two studies are kept


def test_images_with_their_own_study_and_patient_are_not_joined() -> None:
    volumes = partition(scan(0, 12, 1, study_uid=lambda k: f"1.2.{k}", patient=lambda k: f"{k}"), Rules())
    assert [len(v.slices) for v in volumes] == [1] * 12
    # Without a study, the images are not known to be of one patient.
    volumes = partition(scan(0, 12, 1, study_uid="", patient=lambda k: f"{k}"), Rules())
    assert [len(v.slices) for v in volumes] == [1] * 12


def test_a_scan_keeps_its_study_next_to_one_with_a_study_per_image() -> None:
    one = scan(0, 12, 1, study_uid="1.2", patient="a")
    assert instance_numbers(one + scan(50, 9, 21, study_uid=lambda k: f"1.9.{k}", patient="b")) == [
        span(1, 12),
        span(21, 9),
    ]
    without_patient = scan(50, 9, 21, study_uid=lambda k: f"1.9.{k}", patient="")
    assert sorted(instance_numbers(one + without_patient)) == [span(1, 12), *([n] for n in span(21, 9))]


def test_images_without_a_patient_are_assigned_to_the_only_patient_if_studies_are_ignored() -> None:
    images = scan(0, 12, 1, study_uid=lambda k: f"1.2.{k}", patient=lambda k: "" if k % 2 else "a")
    assert instance_numbers(images) == [span(1, 12)]
    two = images + scan(50, 12, 21, study_uid=lambda k: f"1.9.{k}", patient="b")
    volumes = partition(two, Rules())
    assert [[s.instance_number for s in v.slices] for v in volumes] == [span(21, 12), [1, 3, 5, 7, 9, 11]]
    assert {why for _, why in volumes[0].left_out} == {"no Patient ID"}


owner = st.tuples(st.sampled_from(["", "1.2.1", "1.2.2"]), st.sampled_from(["", "a", "b"]))


@given(st.lists(owner, min_size=1, max_size=12))
def test_no_volume_contains_images_of_two_patients_or_studies(pairs: list[tuple[str, str]]) -> None:
    # At most two of each, so that none are ignored as an anonymiser's.
    images = [image(2.0 * k, k, study_uid=study, patient=patient) for k, (study, patient) in enumerate(pairs)]
    volumes = partition(images, Rules())
    for volume in volumes:
        for values in zip(*(pairs[s.instance_number or 0] for s in volume.slices), strict=True):
            assert len({value for value in values if value}) <= 1
    assert sum(len(v.slices) + len(v.left_out) for v in volumes) == len(pairs)


def test_studies_of_one_series_uid_keep_their_own_uids_and_patients(tmp_path: Path) -> None:
    for n in range(2):

        def change(ds: Dataset, _: int, n: int = n) -> None:
            ds.StudyInstanceUID, ds.PatientID = f"1.2.{n}", f"MRN-{n}"

        write_series(tmp_path / "in" / f"{n}", noise(n), (2.5, 0.8, 0.7), series_uid="1.2.3", change=change)
    names = Pseudonyms.load(tmp_path / "key", tmp_path / "out")
    run = gpuprep.convert(tmp_path / "in", tmp_path / "out", HU, backend="cpu", names=names)
    assert [r.status for r in run.results] == ["fixed", "fixed"]
    assert {r.study_uid for r in run.results} == {names.of_uid("study", f"1.2.{n}") for n in range(2)}
    assert {r.folder.partition("/")[0] for r in run.results} == {names.of("patient", f"MRN-{n}") for n in range(2)}
    plain = gpuprep.convert(tmp_path / "in", tmp_path / "plain", HU, backend="cpu")
    assert {(r.study_uid, Path(r.source).name) for r in plain.results} == {("1.2.0", "0"), ("1.2.1", "1")}


def noise(seed: int, slices: int = 6) -> Any:
    return np.random.default_rng(seed).integers(0, 3000, (slices, 8, 10)).astype(np.int16)


# Stacks


@pytest.mark.parametrize("fact", ["frame_of_reference_uid", "stack_id"])
@pytest.mark.parametrize("lacking", [range(1, 20, 2), (3, 9, 15), (0, 1, 2), range(17)], ids=str)
def test_a_frame_of_reference_or_stack_id_missing_in_some_slices_does_not_split_a_series(
    fact: str, lacking: Iterable[int]
) -> None:
    images = [image(2.0 * k, k, **{fact: "" if k in lacking else "7"}) for k in range(20)]
    (volume,) = partition(images, Rules())
    assert [s.instance_number for s in volume.slices] == span(0, 20)
    assert volume.frame_of_reference_uid == ("7" if fact == "frame_of_reference_uid" else "1.4")
    assert audit(volume).codes == ()


def test_a_slice_without_frame_of_reference_is_assigned_by_geometry_or_folder() -> None:
    def two(change: str, lack: Iterable[int], **of_the_second: Any) -> list[Image]:
        one = scan(
            0, 12, 0, frame_of_reference_uid=lambda k: "" if k in lack else "1.4.1", **{change: of_the_second["a"]}
        )
        other = scan(
            90, 9, 20, frame_of_reference_uid=lambda k: "" if k in lack else "1.4.2", **{change: of_the_second["b"]}
        )
        return one + other

    choices: tuple[tuple[str, Any, Any], ...] = (
        ("rows", 16, 32),
        ("pixel_spacing_mm", (0.7, 0.7), (0.8, 0.8)),
        ("folder", "/data/a", "/data/b"),
        ("orientation", (1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, 1, 0)),
    )
    for change, a, b in choices:
        for lack in ((2,), (1, 3, 4)):
            volumes = partition(two(change, lack, a=a, b=b), Rules())
            assert [[s.instance_number for s in v.slices] for v in volumes] == [span(0, 12), span(20, 9)]
            assert [v.frame_of_reference_uid for v in volumes] == ["1.4.1", "1.4.2"]
    volumes = partition(two("rows", (2,), a=16, b=16), Rules())
    assert [len(v.slices) for v in volumes] == [11, 8]  # the others cannot be assigned
    assert volumes[0].left_out == (
        ("0002.dcm", "no Frame of Reference UID"), ("0022.dcm", "no Frame of Reference UID"),
    )  # fmt: skip


def test_a_damaged_frame_of_reference_counts_as_absent() -> None:
    uid = {3: "malformed-03", 25: "malformed-25"}
    images = [
        image(2.0 * k, k, frame_of_reference_uid=uid.get(k, f"1.4.{k // 20}"), rows=16 + k // 20) for k in range(30)
    ]
    assert instance_numbers(images) == [span(0, 20), span(20, 10)]


@given(
    st.lists(st.tuples(st.integers(0, 359), st.integers(0, 2), st.booleans()), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_slices_are_added_to_the_first_stack_of_their_direction(
    turns: list[tuple[int, int, bool]], random: Any
) -> None:
    # Directions that differ by a degree are different; cosines that differ by less than 0.001 are equal.
    images = []
    for n, (degrees, axis, coronal) in enumerate(turns):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        row = np.roll([c, s, 0], axis) if coronal else np.roll([0, c, s], axis)
        column = np.roll([-s, c, 0], axis) if coronal else np.roll([0, -s, c], axis)
        cosines = tuple(float(x) + random.uniform(-4e-4, 4e-4) for x in (*row, *column))
        images.append(image(n, n, orientation=cosines))
    stacks: dict[int, list[int]] = {}
    cosines_of = [np.array(one.orientation) for one in images]
    for n in range(len(images)):
        near = [first for first in stacks if np.abs(cosines_of[first] - cosines_of[n]).max() <= 1e-3]
        stacks.setdefault(near[0] if near else n, []).append(n)
    large = {len(numbers) for numbers in stacks.values() if len(numbers) >= 3}
    volumes = partition(images, Rules())
    assert sum(len(v.slices) + len(v.left_out) for v in volumes) == len(images)
    main = max(stacks.values(), key=lambda numbers: (len(numbers), -numbers[0]))
    assert sorted(s.instance_number or 0 for s in volumes[0].slices) == main
    assert {len(v.slices) for v in volumes} == large | {len(main)}


@pytest.mark.parametrize("damaged", [1e308, -1e308, sys.float_info.max])
@pytest.mark.parametrize("place", range(6))
def test_a_slice_with_huge_direction_cosines_is_left_out(damaged: float, place: int) -> None:
    cosines = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    cosines[place] = damaged
    images = scan(0, 8, 1)
    images[3] = images[3]._replace(orientation=tuple(cosines))
    assert instance_numbers(images) == [[1, 2, 3, 5, 6, 7, 8]]


# Attributes read from headers


def header_of(file: Path) -> SliceHeader:
    ((one,),) = ([i.header for i in contents.images] for contents in read_headers([str(file)]))
    return one


SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: UID(syntax).name)
def test_phases_are_read_in_every_native_syntax(tmp_path: Path, syntax: UID) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.NominalPercentageOfRespiratoryPhase, ds.NominalPercentageOfCardiacPhase = 12.5, 70.0
        ds.NominalCardiacTriggerDelayTime, ds.TriggerTime, ds.TemporalPositionTimeOffset = 710.25, "75.5", 1e-3
        energies = Dataset()
        energies.MonoenergeticEnergyEquivalent = 67.0
        ds.MultienergyCTProcessingSequence = [energies]
        ds.StackID, ds.InStackPositionNumber, ds.DimensionIndexValues = "3", 70000, [1, 2, 70000]

    (file,) = write_series(tmp_path, noise(0, 1), (2.5, 0.8, 0.7), change=change)
    file.write_bytes(encoded_natively(pydicom.dcmread(file), syntax))
    one = header_of(file)
    assert dict(part.split("=") for part in one.phase.split()) == {
        "respiratory": "12.5", "cardiac": "70", "delay": "710.25", "trigger": "75.5", "offset": "0.001", "energy": "67",
    }  # fmt: skip
    assert (one.stack_id, one.other) == ("3", "index=1,2,70000")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("TriggerTime", "Zauberfrau"), ("StackID", "Zauberfrau"),
        ("ContentTime", "112233"), ("SeriesDate", "20250131"), ("PatientID", "Zauberfrau"),
    ],
)  # fmt: skip
def test_texts_and_times_that_separate_images_are_kept_as_hashes_only(tmp_path: Path, keyword: str, value: str) -> None:
    def change(ds: Dataset, _: int) -> None:
        ds.add_new(keyword, "LO", value)

    (file,) = write_series(tmp_path, noise(0, 1), (2.5, 0.8, 0.7), series_uid="1.2.3", change=change)
    ((one,),) = (contents.images for contents in read_headers([str(file)]))
    kept = repr(one._replace(folder="", study_uid="", frame_of_reference_uid="", header=one.header._replace(
        path="", mtime_ns=0, sop_instance_uid="")))  # fmt: skip
    assert value.lower() not in kept.lower()


# By folder


def series_per_slice(folder: str, count: int = 6, **attributes: Any) -> list[Image]:
    return scan(0, count, 1, series_uid=lambda k: f"1.3.{folder}.{k}", folder=f"/data/{folder}",
                **({"path": lambda k: f"/data/{folder}/{k}.dcm"} | attributes))  # fmt: skip


def test_a_series_uid_per_slice_is_rejected_with_a_hint_at_group_by_folder() -> None:
    series = partition(series_per_slice("1") + series_per_slice("2", 2), Rules())
    assert [len(s.slices) for s in series] == [1] * 8
    reasons = [audit(s).reason for s in series]
    assert all("6 series of one image are in its folder: --group-by folder joins them" in r for r in reasons[:6])
    assert all(audit(s).codes == ("one-slice",) for s in series)
    assert "--group-by" not in reasons[6]


@pytest.mark.parametrize("uid", ["each its own", "none"])
def test_group_by_folder_makes_one_series_of_each_folder(uid: str) -> None:
    images = series_per_slice("1") + series_per_slice("2")
    if uid == "none":
        images = [i._replace(series_uid="") for i in images]
        with pytest.raises(InputError, match=r"no Series Instance UID .*--group-by folder makes"):
            check(partition(images, Rules())[0], Rules())
    series = partition(images, BY_FOLDER)
    assert [(s.folder, len(s.slices), audit(s, BY_FOLDER).verdict) for s in series] == [
        ("/data/1", 6, "ok"), ("/data/2", 6, "ok"),
    ]  # fmt: skip
    assert len({s.key for s in series}) == len({s.label for s in series}) == 2
    assert all(s.series_uid.startswith("folder-") for s in series)
    # The key depends neither on the order nor on the number of slices.
    assert partition(images[3::-1], BY_FOLDER)[0].key == series[0].key


def test_group_by_folder_still_splits_by_geometry_and_study() -> None:
    images = series_per_slice("1") + series_per_slice("1", 4, rows=32, path=lambda k: f"/data/1/b{k}")
    assert [(s.part, len(s.slices)) for s in partition(images, BY_FOLDER)] == [(1, 6), (2, 4)]
    images = series_per_slice("1") + series_per_slice("1", study_uid="1.9", path=lambda k: f"/data/1/b{k}")
    assert [i.code for s in partition(images, BY_FOLDER) for i in s.irregularities] == ["studies", "studies"]


@pytest.mark.parametrize("start_mm", [0.0, 1.0, 1.25, 9.0])
def test_series_of_one_folder_with_common_positions_are_not_mixed(start_mm: float) -> None:
    images = scan(0, 9, 1, series_uid="1.3.1") + scan(start_mm, 9, 11, series_uid="1.3.2")
    assert instance_numbers(images, BY_FOLDER) == [span(1, 9), span(11, 9)]


def test_a_folder_of_one_series_keeps_its_uid_and_a_series_in_several_folders_gets_a_warning() -> None:
    whole = scan(0, 9, 1, folder="/data/1")
    (series,) = partition(whole, BY_FOLDER)
    assert (series.key, series.warnings) == ("1.3", ())
    spread = partition(whole + scan(22.5, 9, 11, folder="/data/2"), BY_FOLDER)
    assert [(len(s.slices), s.warnings[0].code) for s in spread] == [(9, "spread"), (9, "spread")]


def test_a_folder_with_a_series_uid_per_slice_is_converted_with_its_masks(tmp_path: Path) -> None:
    stored = noise(0)
    sops: list[str] = []

    def change(ds: Dataset, k: int) -> None:
        ds.SeriesInstanceUID = f"1.2.3.{k + 1}"
        sops.append(str(ds.SOPInstanceUID))

    for n in range(2):
        write_series(tmp_path / "in" / f"{n}", stored, (2.5, 0.8, 0.7), change=change)
    series = gpuprep.discover(tmp_path / "in" / "0", BY_FOLDER)[0]
    square = [np.array([[1, 1], [4, 1], [4, 4], [1, 4]]) * 0.7 + (-100, -120)]
    outline = [np.column_stack([square[0], np.full(4, -300 + 2.5 * k)]) for k in (1, 2)]
    frame = series.frame_of_reference_uid
    write_rtstruct(tmp_path / "rt.dcm", {"heart": outline}, series_uid="1.2.3.1", frame_uid=frame, sop_uids=sops[:6])
    recipe = replace(HU, group_by="folder", masks=Masks())
    run = gpuprep.convert(tmp_path / "in", tmp_path / "out", recipe, backend="cpu", masks=tmp_path / "rt.dcm")
    assert run.counts == {"ok": 2}
    assert [len(r.labels or ()) for r in run.results] == [1, 0]
    volume = gpuprep.load(tmp_path / "in" / "0", recipe, backend="cpu")
    np.testing.assert_array_equal(np.asarray(volume.values), stored - 1024.0)


def test_results_of_a_run_with_another_grouping_are_replaced(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.SeriesInstanceUID = f"1.2.3.{k + 1}"

    write_series(tmp_path / "in" / "a", noise(0), (2.5, 0.8, 0.7), change=change)
    write_series(tmp_path / "in" / "b", noise(1), (2.5, 0.8, 0.7))
    out = tmp_path / "out"

    def statuses(group_by: Any) -> list[str]:
        gpuprep.convert(tmp_path / "in", out, replace(HU, group_by=group_by), backend="cpu")
        with closing(Manifest(manifest_path(out), reading=True)) as manifest:
            return sorted(status for (status,) in manifest.columns("status"))

    assert statuses("uid") == ["ok"] + ["rejected"] * 6
    assert statuses("folder") == ["ok", "ok"]
    assert len(list(out.rglob("volume.json"))) == 2


def test_every_command_that_reads_dicom_accepts_group_by_folder(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        ds.SeriesInstanceUID = f"1.2.3.{k + 1}"

    write_series(tmp_path / "in", noise(0), (2.5, 0.8, 0.7), change=change)
    (tmp_path / "dot.txt").write_text("slice,x,y\n1,2,2\n1,6,2\n1,6,6\n1,2,6\n")
    flags = ["--group-by", "folder", "--index", "none", "--jobs", "1"]

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    scanned = run("scan", tmp_path / "in", "--json", *flags)
    assert [(s["action"], s["slices"]) for s in json.loads(scanned.stdout)["series"]] == [("convert", 6)]
    assert run("show", tmp_path / "in").exit_code == 2  # six series: ambiguous
    shown = run("show", tmp_path / "in", "--group-by", "folder")
    assert (shown.exit_code, "6 images" in shown.stdout) == (0, True)
    how = ["--units", "px", "--index-base", "0", "--slice-order", "stack", "--spacing", "none", "--size", "none"]
    masked = run("mask", tmp_path / "dot.txt", "--series", tmp_path / "in", "--out", tmp_path / "out", *flags, *how)
    assert masked.exit_code == 0, masked.stderr
    assert len(list((tmp_path / "out").rglob("volume.json"))) == 1
