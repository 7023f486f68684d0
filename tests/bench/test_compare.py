"""The arithmetic of the comparison; no other program is needed, and nothing is timed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from bench.compare import agreement, report
from bench.compare.contenders import FLOORS, Contender, contenders, floor, floors, with_gpuprep
from bench.compare.run_contender import answer
from bench.compare.summary import summarise, without_paths
from gpuprep.testing import thorax, write_series

SPACING_MM = (3.0, 2.0, 2.0)


def _run(seconds: float, series: int, **more: Any) -> dict[str, Any]:
    return {
        "cold_s": 2.0,
        "seconds": seconds,
        "series": series,
        "cpu_s": 2 * seconds,
        "bytes_in": 10**6,
        "bytes_out": 4 * 10**6,
    } | more


def _summarised() -> dict[str, dict[str, Any]]:
    split = {"scan_s": 1.0, "read_s": 0.25, "process_s": 1.0, "write_s": 0.25}
    all_ = [
        Contender(name="floor, float32", module="floor", dtype="float32"),
        Contender(
            name="gpuprep, float32", module="with_gpuprep", dtype="float32", floor="float32", options={"jobs": 2}
        ),
        Contender(name="slow", module="slow", dtype="float32"),
        Contender(name="gone", module="gone", dtype="uint8"),
    ]
    records: dict[str, dict[str, Any]] = {
        "floor, float32": {"status": "ok", "dtype": "float32", "runs": [_run(1, 4), _run(2, 4), _run(9, 4)]},
        "gpuprep, float32": {"status": "ok", "dtype": "float32", "runs": [_run(s, 4, split=split) for s in (4, 4, 9)]},
        "slow": {"status": "ok", "dtype": "float32", "runs": [_run(10, 1), _run(20, 1)]},
        "gone": {"status": "absent", "dtype": "uint8", "reason": "gone is not installed"},
    }
    summarise(records, all_)
    return records


def test_a_summary_has_medians_per_series_and_of_the_ratios_in_each_round() -> None:
    records = _summarised()
    assert records["floor, float32"]["seconds_per_series"] == 0.5
    assert records["floor, float32"]["seconds_per_series_range"] == [0.25, 2.25]
    ours = records["gpuprep, float32"]
    assert ours["series_per_hour"] == 3600
    assert (ours["ratio_to_floor"], ours["ratio_to_floor_range"]) == (2, [1, 4])
    assert (ours["mb_per_s_in"], ours["mb_per_s_out"]) == (0.25, 1)
    assert ours["cpu_s_per_series"] == 2
    assert records["slow"]["ratio_to_gpuprep"] == 15  # the third round of gpuprep has no counterpart
    assert "ratio_to_gpuprep" not in records["gone"]


def test_the_accounted_share_compares_stage_times_with_wall_time() -> None:
    split = _summarised()["gpuprep, float32"]["split"]
    assert split["accounted_share"] == (1 + 1.5 * 4 / 2) / ((4 + 4 + 9) / 3)


def _result() -> dict[str, Any]:
    machine, cohort = {"cores": 2, "cpu": "some"}, {"phantoms": (1, 2, 3)}
    result: dict[str, Any] = json.loads(json.dumps({"machine": machine, "cohort": cohort, "contenders": _summarised()}))
    return result


def test_tables_list_all_contenders() -> None:
    assert "absent: gone is not installed" in report.table(_result())
    assert "largest Δ HU" not in report.table(_result())  # nobody has a value
    assert report.markdown(_result()).count("\n|---") == 2


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.chart(_result(), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_names_of_contenders_are_unique() -> None:
    all_ = contenders(16, True, Path("scratch"))
    names = [c.name for c in (*all_, *floors(16, {name: {} for name in FLOORS}))]
    assert len(names) == len(set(names))
    assert {"gpuprep, float32", "gpuprep, uint8", "gpuprep, uint8 stack"} <= set(names)  # references of the ratios


@pytest.mark.parametrize("flushed", [True, False])
def test_the_floor_writes_files_of_the_given_sizes_and_flushes_each_and_the_folder(
    flushed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed_files: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed_files.append(os.fstat(file).st_ino))
    folder = tmp_path / "series"
    folder.mkdir()
    (folder / "a.dcm").write_bytes(b"1234")
    sizes_bytes = [3, floor.WRITE_BYTES, 2 * floor.WRITE_BYTES + 5]
    out = tmp_path / "out"
    floor.copy(folder, out, sizes_bytes, flushed)
    assert [f.stat().st_size for f in sorted(out.iterdir())] == sizes_bytes
    assert sorted(flushed_files) == (sorted(f.stat().st_ino for f in (out, *out.iterdir())) if flushed else [])


def test_gpuprep_agrees_with_the_reference_and_a_shifted_volume_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "dicom" / "patient"
    write_series(folder, thorax((8, 48, 48), SPACING_MM), SPACING_MM)
    converted = with_gpuprep.convert_all([folder], tmp_path / "out", recipe={})
    hu, spacing_mm = agreement.hounsfield(folder)
    expected = agreement.reference(hu, spacing_mm, order=3)
    values = agreement.read_output(tmp_path / "out" / converted["outputs"]["patient"])
    assert agreement.largest_difference_hu(values, expected) <= agreement.tolerance_hu("float32")
    assert agreement.largest_difference_hu(np.roll(values, 1, axis=2), expected) > agreement.tolerance_hu("uint8")
    assert set(converted["split"]) >= {"scan_s", "read_s", "process_s", "write_s"}


def test_a_stack_and_slices_are_read_alike(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name in ("stack", "slices"):
        (tmp_path / name).mkdir()
    tifffile.imwrite(tmp_path / "stack" / "volume.tif", values, photometric="minisblack")
    for k, image in enumerate(values):
        tifffile.imwrite(tmp_path / "slices" / f"{k:04d}.tif", image)
    stack, slices = (agreement.read_output(tmp_path / name) for name in ("stack", "slices"))
    np.testing.assert_array_equal(stack, slices)
    np.testing.assert_array_equal(slices, values / np.float32(255))


def test_at_least_the_middle_third_remains_inside_the_border() -> None:
    assert agreement.inner((24, 60), (8, 60), border=2) == (slice(6, 18), slice(2, 58))
    assert agreement.inner((9,), (3,), border=8) == (slice(3, 6),)


def test_errors_of_a_contender_are_returned_as_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not installed" in answer("nothing_of_that_name", {}, [], tmp_path)["absent"]
    assert "TypeError" in answer("floor", {}, [], tmp_path)["failed"]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--data=/home/me/ct/ --out bench/results/a.json", "--data=…/ct --out bench/results/a.json"),
        ("OSError: no '/data/x/y.dcm'\n at 3 s/series", "OSError: no '…/y.dcm' at 3 s/series"),
        ("--data ../ct ./here", "--data ../ct ./here"),
    ],
)
def test_paths_in_results_are_cut_to_their_last_part(text: str, expected: str) -> None:
    assert without_paths(text) == expected
