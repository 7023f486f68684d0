"""A look at one series: what is told of it, the histogram in text, pictures in a terminal and in a file; refusals."""

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
from gpuprep.report.inspect_series import glance, spread
from gpuprep.report.montage import montage, shares, text_histogram
from gpuprep.testing import write_series

LEFT_HU, RIGHT_HU = -100, 200
COLUMNS = 24


def two_halves(slices: int = 6) -> np.ndarray[Any, Any]:
    """Return stored values: fat on the left, something dense on the right; a line of voxels more in each slice."""
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


def test_dicom_is_told_in_lines(series: Path) -> None:
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


def test_an_output_is_told_in_the_same_lines(series: Path, out: Path) -> None:
    told, of_output = show(series).stdout.splitlines(), show(out / "ct").stdout.splitlines()
    assert of_output[0] == f"{out / 'ct'}: image of a series of 6 images"
    assert of_output[1:] == told[1:]
    assert show(out).stdout.splitlines() == of_output  # the only one there


def test_what_is_irregular_is_told_and_mended(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", two_halves(12), (2.5, 0.8, 0.7))[4].unlink()
    result = show(tmp_path / "gap")
    assert result.stdout.splitlines()[1] == "fixed gap"
    assert "12 × 20 × 24 voxels" in result.stdout
    assert "1 missing" in result.stdout


def test_what_is_rejected_is_told_with_its_reason(tmp_path: Path) -> None:
    write_series(tmp_path / "one", two_halves(1), (2.5, 0.8, 0.7))
    result = show(tmp_path / "one")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1] == "rejected one-slice"


def test_planes_are_half_blocks_where_there_are_colours(series: Path) -> None:
    result = show(series, FORCE_COLOR="1", COLORTERM="truecolor", TERM="xterm", COLUMNS="100")
    rows = [line for line in result.stdout.splitlines() if "▀" in line]
    assert len({line.count("▀") for line in rows}) == 1
    # In [−1000, 400] HU −100 is (900 / 1400) · 255 = 164, left of the middle, and 200 is 1200 / 1400 · 255 = 219.
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
        # Tiles are 208 pixels wide; columns of 24 · 0.7 mm are longer than rows of 20 · 0.8 mm.
        first = pixels[:, 16 : 16 + 208]
        left = np.flatnonzero((first[:, 30] == 164).all(axis=1))
        right = np.flatnonzero((first[:, 180] == 219).all(axis=1))
        assert len(left) == len(right) == 2 * round(208 * 16 / 16.8)  # two rows of tiles: five, and one


@pytest.mark.parametrize(
    ("format_", "compression"),
    [("tif-stack", "zlib"), ("npy", "none"), ("nifti", "zlib"), ("zarr", "zstd"), ("tif", "zstd")],
)
def test_slices_of_every_format_are_the_same(format_: Any, compression: Any, series: Path, tmp_path: Path) -> None:
    for extra in {"nifti": ("nibabel", "isal"), "zarr": ("zarr",)}.get(format_, ()):
        pytest.importorskip(extra)
    recipe = gpuprep.Recipe(size=None, spacing_mm=None, dtype="int16", format=format_, compression=compression)
    gpuprep.convert(series, tmp_path / "out", recipe, backend=NumpyBackend("matmul"), jobs=1)
    seen = glance(str(tmp_path / "out" / "ct"))
    assert [k for k, _ in seen.slices] == [0, 1, 2, 3, 4, 5]
    for _, values in seen.slices:
        assert values.shape == (20, COLUMNS)
        assert set(values[:, : COLUMNS // 2].ravel()) == {164}
        assert set(values[:, COLUMNS // 2 :].ravel()) == {219}


def test_slices_are_at_equal_distances() -> None:
    assert spread(1) == [0]
    assert spread(20) == list(range(20))
    assert spread(39) == list(range(0, 39, 2))
    assert len(spread(1000)) == 20
    assert (spread(1000)[0], spread(1000)[-1]) == (0, 999)


def test_a_histogram_in_text_has_each_voxel_in_its_column() -> None:
    histogram = Histogram()
    histogram.add(np.array([-1000] * 3 + [52], dtype=np.int16), 1, 0)
    quality = histogram.to_dict()
    assert quality is not None
    # 128 columns of 16 HU from −1024 on: −1000 is in the second, whose bin is stored as such; 52 in the 68th.
    found = shares(quality, 128)
    assert found[1] == pytest.approx(0.75)
    assert found[67] == pytest.approx(0.25)
    assert found.sum() == pytest.approx(1)
    *bars, bands, axis = text_histogram(quality, 128)
    assert [line[1] for line in bars] == ["█"] * 6
    assert "".join(line[67] for line in bars).count("█") == 3  # the root of a third of 48 eighths: 27.7
    assert bands[0] == "a"
    assert bands[(-1024 + 1024 + 16 * 5) // 16] == "l"
    assert bands[67:69] == "mi"  # muscle ends at 55 HU, and liver at 70
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


def test_what_is_not_there_and_what_is_damaged_is_one_line(series: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (out / "ct" / "0003.tif").write_bytes(b"")
    for args, code, words in (
        ([tmp_path / "nowhere"], 2, "does not exist"),
        ([tmp_path / "empty"], 3, "there is no CT series in"),
        ([series, "--series-uid", "9"], 3, "there is no series 9 in"),
        ([series, "--png", tmp_path / "no" / "a.png"], 2, "cannot write"),
        ([out / "ct"], 1, "see gpuprep verify"),
    ):
        result = show(*args)
        assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.stderr
        assert words in result.stderr
    (out / "ct" / "volume.json").write_text("{}")
    assert "is not as it was written" in show(out / "ct").stderr
    file = next(series.glob("*.dcm"))
    file.write_bytes(file.read_bytes()[:-100])
    result = show(series)
    assert (result.exit_code, result.stderr) == (1, "")
    assert "rejected truncated" in result.stdout


def test_a_montage_of_what_has_no_picture_says_so_all_the_same(tmp_path: Path) -> None:
    write_series(tmp_path / "one", two_halves(1), (2.5, 0.8, 0.7))
    assert montage(glance(str(tmp_path / "one"))).width > 0
