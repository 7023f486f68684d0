"""`gpuprep show`: text, histogram, pictures in the terminal and in a file, and error messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import gpuprep
from gpuprep.cli.app import app
from gpuprep.compute.backend import NumpyBackend
from gpuprep.compute.hu_histogram import Histogram
from gpuprep.report.inspect_series import slice_indices, summarise_series
from gpuprep.report.montage import montage, shares, text_histogram
from gpuprep.testing import write_series

LEFT_HU, RIGHT_HU = -100, 200
COLUMNS = 24


def two_halves(slices: int = 6) -> np.ndarray[Any, Any]:
    """Return stored values of slices with −100 HU in the left half and 200 HU in the right half."""
    stored = np.full((slices, 20, COLUMNS), LEFT_HU + 1024, dtype=np.int16)
    stored[:, :, COLUMNS // 2 :] = RIGHT_HU + 1024
    return stored


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "ct", two_halves(), (2.5, 0.8, 0.7), series_uid="1.2.3")
    return tmp_path / "ct"


@pytest.fixture
def out(series: Path, tmp_path: Path) -> Path:
    recipe = gpuprep.Recipe(size=None, spacing_mm=None)
    run = gpuprep.convert(series, tmp_path / "out", recipe, backend=NumpyBackend("matmul"), jobs=1)
    assert run.exit_code == 0
    return tmp_path / "out"


def show(*args: str | Path, **env: str) -> Any:
    return CliRunner().invoke(app, ["show", *map(str, args)], env=env, catch_exceptions=False)


def test_a_dicom_series_is_summarised_in_text(series: Path) -> None:
    result = show(series)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert lines[0].startswith(f"{series}: series series-1-")
    assert lines[0].endswith(", 6 images")
    assert lines[1] == "ok"
    assert lines[2] == "6 × 20 × 24 voxels of 2.5 × 0.8 × 0.7 mm (slices, rows, columns), axial SPL"
    assert lines[3] == "-100 to 200 HU, mean 50 HU, 0.0% padding"
    assert "f fat    50.0% of -120…-50" in result.stdout
    assert "\x1b" not in result.stdout


def test_an_output_has_the_same_summary_as_its_dicom(series: Path, out: Path) -> None:
    of_dicom, of_output = show(series).stdout.splitlines(), show(out / "ct").stdout.splitlines()
    assert of_output[0] == f"{out / 'ct'}: image of a series of 6 images"
    assert of_output[1:] == of_dicom[1:]
    assert show(out).stdout.splitlines() == of_output  # the only output of the run


def test_a_missing_slice_is_reported_and_filled(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", two_halves(12), (2.5, 0.8, 0.7))[4].unlink()
    result = show(tmp_path / "gap")
    assert result.stdout.splitlines()[1] == "fixed gap"
    assert "12 × 20 × 24 voxels" in result.stdout
    assert "1 missing" in result.stdout


def test_a_rejected_series_is_reported_with_its_reason(tmp_path: Path) -> None:
    write_series(tmp_path / "one", two_halves(1), (2.5, 0.8, 0.7))
    result = show(tmp_path / "one")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1] == "rejected one-slice"


def test_planes_are_drawn_with_half_blocks_if_the_terminal_has_colours(series: Path) -> None:
    result = show(series, FORCE_COLOR="1", COLORTERM="truecolor", TERM="xterm", COLUMNS="100")
    rows = [line for line in result.stdout.splitlines() if "▀" in line]
    assert len({line.count("▀") for line in rows}) == 1
    # In the window [−1000, 400] HU, −100 HU is 900 / 1400 · 255 = 164, and 200 HU is 1200 / 1400 · 255 = 219.
    colours = re.findall(r"38;2;(\d+);(\d+);(\d+)", rows[len(rows) // 2])
    assert colours[3] == ("164", "164", "164")
    assert ("219", "219", "219") in colours
    plain = show(series, FORCE_COLOR="1", TERM="dumb")
    assert "▀" not in plain.stdout


def test_the_picture_has_slices_at_equal_distances_and_the_histogram(series: Path, out: Path, tmp_path: Path) -> None:
    for source in (series, out / "ct"):
        result = show(source, "--png", tmp_path / "look.png")
        assert result.stdout.endswith(f"{tmp_path / 'look.png'} has 6 slices and the histogram\n")
        with Image.open(tmp_path / "look.png") as sheet:
            pixels = np.asarray(sheet)
        # Tiles are 208 pixels wide, because the width of 24 · 0.7 mm exceeds the height of 20 · 0.8 mm.
        first = pixels[:, 16 : 16 + 208]
        left = np.flatnonzero((first[:, 30] == 164).all(axis=1))
        right = np.flatnonzero((first[:, 180] == 219).all(axis=1))
        assert len(left) == len(right) == 2 * round(208 * 16 / 16.8)  # two rows of tiles: five and one


@pytest.mark.parametrize(
    ("format_", "compression"),
    [("tif-stack", "zlib"), ("npy", "none"), ("nifti", "zlib"), ("zarr", "zstd"), ("tif", "zstd")],
)
def test_slices_are_read_from_every_format(format_: Any, compression: Any, series: Path, tmp_path: Path) -> None:
    for extra in {"nifti": ("nibabel", "isal"), "zarr": ("zarr",)}.get(format_, ()):
        pytest.importorskip(extra)
    recipe = gpuprep.Recipe(size=None, spacing_mm=None, dtype="int16", format=format_, compression=compression)
    gpuprep.convert(series, tmp_path / "out", recipe, backend=NumpyBackend("matmul"), jobs=1)
    seen = summarise_series(str(tmp_path / "out" / "ct"))
    assert [k for k, _ in seen.slices] == [0, 1, 2, 3, 4, 5]
    for _, values in seen.slices:
        assert values.shape == (20, COLUMNS)
        assert set(values[:, : COLUMNS // 2].ravel()) == {164}
        assert set(values[:, COLUMNS // 2 :].ravel()) == {219}


def test_at_most_20_slices_are_selected_at_equal_distances() -> None:
    assert slice_indices(1) == [0]
    assert slice_indices(20) == list(range(20))
    assert slice_indices(39) == list(range(0, 39, 2))
    assert len(slice_indices(1000)) == 20
    assert (slice_indices(1000)[0], slice_indices(1000)[-1]) == (0, 999)


def test_a_text_histogram_counts_each_voxel_in_its_column() -> None:
    histogram = Histogram()
    histogram.add(np.array([-1000] * 3 + [52], dtype=np.int16), 1, 0)
    quality = histogram.to_dict()
    assert quality is not None
    # 128 columns of 16 HU from −1024 on: −1000 HU is in the second, which equals a stored bin, and 52 HU in the 68th.
    found = shares(quality, 128)
    assert found[1] == pytest.approx(0.75)
    assert found[67] == pytest.approx(0.25)
    assert found.sum() == pytest.approx(1)
    *bars, bands, axis = text_histogram(quality, 128)
    assert [line[1] for line in bars] == ["█"] * 6
    assert "".join(line[67] for line in bars).count("█") == 3  # √(0.25 / 0.75) · 48 eighths = 27.7
    assert bands[0] == "a"
    assert bands[(-1024 + 1024 + 16 * 5) // 16] == "l"
    assert bands[67:69] == "mi"  # muscle ends at 55 HU, and liver at 70 HU
    assert axis.rstrip(" HU").split() == ["-1000", "-500", "0", "500", "1000"]


def test_several_series_are_listed_in_one_line_and_one_can_be_chosen(series: Path, tmp_path: Path) -> None:
    write_series(series, two_halves(), (5.0, 0.8, 0.7), series_uid="1.2.4", series_number=2)
    result = show(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        f"gpuprep: there are 2 CT series in {tmp_path}: choose one by series_uid (--series-uid): 1.2.3 (6 slices), "
        "1.2.4 (6 slices)\n"
    )
    assert "voxels of 5 × 0.8 × 0.7 mm" in show(tmp_path, "--series-uid", "1.2.4").stdout


def test_several_outputs_are_listed_in_one_line(series: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "other", two_halves(), (5.0, 0.8, 0.7))
    recipe = gpuprep.Recipe(size=None, spacing_mm=None)
    paths = [series, tmp_path / "other"]
    gpuprep.convert(paths, tmp_path / "out", recipe, backend=NumpyBackend("matmul"), jobs=1)
    result = show(tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        f"gpuprep: {tmp_path / 'out'} is the --out of a run that made {tmp_path / 'out' / 'ct'}, "
        f"{tmp_path / 'out' / 'other'}: choose one\n"
    )


def test_missing_and_damaged_inputs_give_one_line_of_error(series: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (out / "ct" / "0003.tif").write_bytes(b"")
    for args, code, message in (
        ([tmp_path / "nowhere"], 2, "does not exist"),
        ([tmp_path / "empty"], 3, "there is no CT series in"),
        ([series, "--series-uid", "9"], 3, "there is no series 9 in"),
        ([series, "--png", tmp_path / "no" / "a.png"], 2, "cannot write"),
        ([out / "ct"], 1, "see gpuprep verify"),
    ):
        result = show(*args)
        assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.stderr
        assert message in result.stderr
    (out / "ct" / "volume.json").write_text("{}")
    assert "is not as it was written" in show(out / "ct").stderr
    file = next(series.glob("*.dcm"))
    file.write_bytes(file.read_bytes()[:-100])
    result = show(series)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "rejected truncated" in result.stdout


def test_the_montage_of_a_rejected_series_has_no_slices_but_is_drawn(tmp_path: Path) -> None:
    write_series(tmp_path / "one", two_halves(1), (2.5, 0.8, 0.7))
    assert montage(summarise_series(str(tmp_path / "one"))).width > 0
