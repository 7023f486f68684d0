"""The command line: flags to a recipe, results to standard output, errors to one line and an exit code."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import tifffile
import typer
from cohort import LIGHT
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless
from typer.testing import CliRunner

from gpuprep import __version__
from gpuprep.__main__ import main as start
from gpuprep.cli.app import app
from gpuprep.core.recipe import Recipe
from gpuprep.executors.fork_server import LOOP_MODULES
from gpuprep.output.folder_store import open_output
from gpuprep.testing import outlines, thorax, write_series

COMMANDS = ["convert", "scan", "demo", "doctor"]
SMALL = ["--spacing", "5,2,2", "--size", "6,5", "--jobs", "1", "--backend", "cpu"]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Restore the signal handlers that the command line replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Result:
    """Output and exit code of a command."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def error_line(self) -> str:
        """The only line on standard error."""
        assert self.stderr.count("\n") == 1, self.stderr
        assert self.stderr.startswith("gpuprep: ")
        return self.stderr


def run(*args: str | Path) -> Result:
    """Run a command in this process; an exception is raised, since it would be printed as a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert "Traceback" not in result.stdout + result.stderr
    return Result(result.exit_code, result.stdout, result.stderr)


def run_apart(*args: str | Path, **options: Any) -> Result:
    """Run a command in another process."""
    command = [sys.executable, "-m", "gpuprep", *map(str, args)]
    options["env"] = options.get("env", os.environ) | LIGHT
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)
    assert "Traceback" not in done.stdout + done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): ((s := p.lstat()).st_mtime_ns, s.st_size) for p in sorted(folder.rglob("*")) if not p.is_dir()}


def garble(ds: Dataset, _: int) -> None:
    """Declare JPEG-LS, but contain other bytes."""
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    ds.PixelData = encapsulate([b"garbage" * 9])
    ds["PixelData"].is_undefined_length = True


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def mixed(small_series: Path) -> Path:
    """One regular series and one with a missing slice."""
    write_series(small_series / "gap", np.zeros((5, 4, 4), np.int16), (2.5, 0.8, 0.7))[2].unlink()
    return small_series


# --- help and version


def test_the_version_is_that_of_the_package() -> None:
    assert run_apart("--version").stdout == f"gpuprep {__version__}\n"
    assert run("--version").stdout == f"gpuprep {__version__}\n"


def test_without_arguments_help_is_printed() -> None:
    result = run()
    assert all(command in result.stdout + result.stderr for command in COMMANDS)


def plain(text: str) -> str:
    """Return text without colours, boxes and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─|]", " ", text).split())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ["convert", "scan", "demo", "doctor", "Exit codes: 0 all done", "2 bad request", "4 backend"]),
        (
            ("convert",),
            [
                *("DICOM_DIR", "--out", "-o", "--recipe", "--spacing", "--order", "--anti-alias", "--window", "--size"),
                *("--fit", "--dtype", "--format", "--compression", "--backend", "--engine", "--jobs", "--limit"),
                *("--dry-run", "--quiet", "-q", "--json"),
            ],
        ),
        (("scan",), ["DICOM_DIR", "--recipe", "--json"]),
        (("demo",), ["OUT", "--backend", "--jobs"]),
        (("doctor",), ["--gpu", "--json"]),
    ],
)
def test_help_lists_all_commands_and_flags(command: tuple[str, ...], words: list[str]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert result.stderr == ""
    assert [word for word in words if word not in plain(result.stdout)] == []


def test_help_does_not_wait_for_numpy() -> None:
    slow = ["numpy", "scipy", "skimage", "pydicom", "tifffile", "cupy", "cucim"]
    code = f"import sys, gpuprep.cli.app; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


CONVERTED = """
import sys
from gpuprep.__main__ import main
try:
    main()
except SystemExit as exc:
    print(exc.code, sorted({"pydicom", "requests", "scipy", "numba", "tifffile", "imagecodecs"} & set(sys.modules)))
"""


def test_the_main_process_of_a_conversion_loads_no_library_that_only_workers_need(tmp_path: Path) -> None:
    write_series(tmp_path / "in", thorax((4, 16, 16), (3, 9, 9)), (3, 9, 9))
    words = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--quiet", "--index", "none", *SMALL]
    done = subprocess.run([sys.executable, "-c", CONVERTED, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "0 []\n"


@pytest.mark.skipif(find_spec("cupy") is not None, reason="workers may compute on a GPU")
@pytest.mark.parametrize(
    ("line", "early"),
    [
        ("convert in --out new", True),
        ("mask seg.dcm --series in --out new", True),
        ("convert in --out done", False),  # it has a manifest, and may be complete
        ("convert --help", False),
        ("convert in --out new --dry-run", False),
        ("convert in --out new --scheduler local", False),
        ("scan in", False),
        ("", False),
    ],
)
def test_workers_begin_to_load_before_the_command_line_is_parsed_if_there_most_likely_is_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, early: bool
) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpuprep.executors.fork_server.start_fork_server", started.append)
    monkeypatch.setattr("atexit.register", lambda _: None)
    monkeypatch.setattr("gpuprep.cli.app.main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpuprep", *line.split()])
    Path("done").mkdir()
    Path("done/manifest.sqlite").touch()
    start()
    assert started == ([LOOP_MODULES] if early else [])


def test_importing_the_package_loads_nothing_large() -> None:
    large = ["cupy", "cucim", "skimage", "rich", "numpy", "scipy", "pydicom", "typer"]
    code = f"import sys, gpuprep; print([m for m in {large} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_can_be_imported() -> None:
    import gpuprep

    assert set(gpuprep.__all__) >= {"convert", "discover", "process", "read", "stack", "Recipe", "Geometry"}
    assert all(getattr(gpuprep, name) is not None for name in gpuprep.__all__)
    assert dir(gpuprep) == sorted(gpuprep.__all__)
    with pytest.raises(AttributeError, match="no attribute 'resample'"):
        _ = gpuprep.resample


# --- exit codes


def test_a_complete_conversion_is_exit_code_0(small_series: Path, out: Path) -> None:
    result = run("convert", small_series, "--out", out, *SMALL)
    assert result.code == 0
    assert re.search(r"ok +1 +6 +5", plain(result.stdout))  # one series of 6 slices: 3 slices, preview.jpg, volume.json
    assert (out / "dicom" / "ct" / "volume.json").is_file()
    assert "spacing_mm=5.0,2.0,2.0" in result.stderr
    again = run("convert", small_series, "-o", out, *SMALL)
    assert again.code == 0
    assert "skipped" in again.stdout


def test_a_rejected_series_is_exit_code_1_and_a_line_with_the_reason(mixed: Path, out: Path) -> None:
    result = run("convert", mixed, "--out", out, *SMALL)
    assert result.code == 1
    line = next(line for line in result.stderr.splitlines() if line.startswith("rejected"))
    assert f"{mixed}/gap: gap: slices are 2.500 mm apart" in line


def test_an_unreadable_file_is_exit_code_1(small_series: Path, out: Path) -> None:
    (small_series / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00\xff")
    result = run("convert", small_series, "--out", out, *SMALL)
    assert result.code == 1
    assert f"unreadable  {small_series}/broken.dcm" in result.stderr
    assert "1 DICOM files or folders unreadable" in result.stdout


BAD_VALUES = [
    (["--spacing", "0"], "spacing_mm"),
    (["--spacing", "1,1"], "spacing_mm"),
    (["--spacing", "nan"], "spacing_mm"),
    (["--spacing", "1,inf,1"], "spacing_mm"),
    (["--spacing", "-1"], "spacing_mm"),
    (["--spacing", "fine"], "give numbers separated by commas, or none"),
    (["--spacing", ""], "give numbers separated by commas, or none"),
    (["--spacing", "1;1;1"], "give numbers separated by commas, or none"),
    (["--order", "6"], "order = 6"),
    (["--order", "-1"], "order = -1"),
    (["--window", "400,-1000"], "the first number must be the smaller one"),
    (["--window", "400"], "low,high in HU, or none"),
    (["--window", "nan,400"], "window_hu"),
    (["--window", "-1000:400"], "give numbers separated by commas, or none"),
    (["--window", "none", "--dtype", "uint8"], "window_hu is none"),
    (["--size", "0"], "size"),
    (["--size", "1.5"], "give numbers separated by commas, or none"),
    (["--size", "1,2,3"], "size"),
    (["--size", "1e99"], "give numbers separated by commas, or none"),
    (["--size", "9" * 5000], "size"),
    (["--recipe", "clasic"], "did you mean 'classic'?"),
    (["--recipe", "absent.toml"], "cannot read the recipe absent.toml"),
    (["--recipe", "/"], "cannot read the recipe /"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_VALUES, ids=lambda v: " ".join(v)[:30] if isinstance(v, list) else "")
def test_a_bad_value_is_one_line_and_exit_code_2(small_series: Path, out: Path, flags: list[str], words: str) -> None:
    result = run("convert", small_series, "--out", out, *flags)
    assert result.code == 2
    assert words in result.error_line
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    [["--fit", "squeeze"], ["--dtype", "float64"], ["--jobs", "0"], ["--limit", "0"], ["--order", "x"], ["--nonsense"]],
)
def test_a_value_that_is_no_choice_is_exit_code_2(small_series: Path, out: Path, flags: list[str]) -> None:
    result = run("convert", small_series, "--out", out, *flags)
    assert result.code == 2
    assert flags[0] in plain(result.stderr)
    assert result.stdout == ""
    assert not out.exists()


def test_the_output_folder_has_to_be_given(small_series: Path) -> None:
    result = run("convert", small_series)
    assert result.code == 2
    assert "--out" in plain(result.stderr)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["for real", "dry run"])
def test_output_equal_to_input_is_exit_code_2(small_series: Path, dry: list[str]) -> None:
    result = run("convert", small_series, "--out", small_series, *dry)
    assert result.code == 2
    assert "lies in the output folder" in result.stderr


@pytest.mark.parametrize("command", ["convert", "scan"])
def test_a_folder_that_does_not_exist_is_exit_code_2(tmp_path: Path, out: Path, command: str) -> None:
    options = ["--out", str(out), "-q"] if command == "convert" else []
    result = run(command, tmp_path / "absent", *options)
    assert result.code == 2
    assert f"{tmp_path}/absent does not exist" in result.error_line


def test_an_output_in_use_is_exit_code_2(small_series: Path, out: Path) -> None:
    with open_output(out):
        result = run("convert", small_series, "--out", out, "-q", *SMALL)
    assert result.code == 2
    assert "another gpuprep is writing into" in result.error_line


@pytest.mark.parametrize("command", ["convert", "scan", "dry run"])
def test_nothing_found_is_exit_code_3(tmp_path: Path, out: Path, command: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no DICOM")
    args: dict[str, list[str | Path]] = {
        "convert": ["convert", "-q", "--out", out],
        "scan": ["scan"],
        "dry run": ["convert", "--dry-run", "-o", out],
    }
    result = run(*args[command], empty)
    assert result.code == 3
    assert result.error_line == f"gpuprep: no CT series under {empty}\n"


@pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is installed")
@pytest.mark.parametrize("command", ["convert", "demo"])
def test_a_missing_gpu_is_exit_code_4_and_the_message_says_what_to_install(
    small_series: Path, out: Path, command: str
) -> None:
    args: list[str | Path] = [small_series, "--out", out] if command == "convert" else [out]
    result = run(command, *args, "--backend", "gpu")
    assert result.code == 4
    assert "CuPy is not installed" in result.error_line
    assert "pip install 'gpuprep[cuda12]' or 'gpuprep[cuda13]'" in result.error_line
    assert not out.exists()


@pytest.mark.parametrize("name", ["recipe.toml", "manifest.csv", "manifest.sqlite"])
def test_a_record_that_cannot_be_written_is_a_one_line_error(small_series: Path, out: Path, name: str) -> None:
    (out / name).mkdir(parents=True)
    result = run("convert", small_series, "--out", out, "-q", *SMALL)
    assert result.code in (1, 2)
    assert name in result.error_line


def test_an_interruption_while_libraries_load_is_one_line_and_exit_code_130(
    small_series: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # If its import is interrupted, NumPy cannot be imported again, not even to print the message in colour.
    def interrupt(_: str) -> Recipe:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "preset", interrupt)
    monkeypatch.setitem(sys.modules, "gpuprep.cli.console", None)
    result = run("convert", small_series, "--out", out)
    assert result.code == 130
    assert "interrupted" in result.error_line


# --- recipe and flags


def test_flags_override_the_recipe_and_are_saved(small_series: Path, tmp_path: Path, out: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'base = "classic"\npadding = "keep"\norder = 5\nsize = 99\n[masks]\nroi = "x"\naliases = {lung = ["Lunge"]}\n'
    )
    flags = [
        *("--spacing", "3,2,2.5", "--order", "1", "--anti-alias", "both", "--window", "-500,500", "--size", "8,6"),
        *("--fit", "crop", "--dtype", "int16", "--format", "tif-stack", "--compression", "zlib"),
        *("--masks", "auto", "--crop", "mask:lung", "--margin", "2.5", "--crop-missing", "whole"),
        *("--policy", "strict", "--spacing-tolerance", "0.02", "--position-tolerance-mm", "0.03"),
        *("--lean-tolerance-mm", "0.2", "--max-missing", "2", "--max-missing-share", "0.25", "--assume-hu"),
        *("--orient", "LPS", "--group-by", "folder"),
        *("--roi", "lung", "--mask-layout", "per-roi", "--mask-resampling", "smooth", "--seg-threshold", "0.25"),
        *("--text-format", "points", "--units", "cm", "--index-base", "1", "--pixel-base", "1"),
        *("--slice-from", "column", "--slice-order", "instance"),
    ]
    result = run("convert", small_series, "--out", out, "--recipe", file, *flags, "--jobs", "1", "--engine", "ndimage")
    assert result.code == 0
    assert tomllib.loads((out / "recipe.toml").read_text()) == {
        "policy": "strict",
        "spacing_tolerance": 0.02,
        "position_tolerance_mm": 0.03,
        "lean_tolerance_mm": 0.2,
        "max_missing": 2,
        "max_missing_share": 0.25,
        "assume_hu": True,
        "group_by": "folder",
        "orient": "LPS",
        "padding": "keep",  # the file
        "crop": "mask:lung",
        "crop_margin_mm": 2.5,
        "crop_missing": "whole",
        "align": "corner",  # its base
        "spacing_mm": [3.0, 2.0, 2.5],
        "order": 1,
        "anti_alias": "both",
        "window_hu": [-500.0, 500.0],
        "size": [8, 6],
        "fit": "crop",
        "dtype": "int16",
        "format": "tif-stack",
        "compression": "zlib",
        "image": True,
        "masks": {
            "aliases": {"lung": ["Lunge"]},  # the file
            "roi": "lung",
            "layout": "per-roi",
            "resampling": "smooth",
            "threshold": 0.25,
            "text_format": "points",
            "units": "cm",
            "index_base": 1,
            "pixel_base": 1,
            "slice_from": "column",
            "slice_order": "instance",
            "codes": {},
        },
        "select": {"where": "none", "best_per": "none", "prefer": "none", "drop_duplicates": False},
    }
    sidecar = json.loads((out / "dicom" / "ct" / "volume.json").read_text())
    assert (sidecar["shape"], sidecar["dtype"], sidecar["engine"]) == ([5, 8, 6], "int16", "ndimage")
    assert [p.name for p in (out / "dicom" / "ct").glob("*.tif")] == ["volume.tif"]
    # The written recipe is itself a recipe, and gives the same output: nothing is left to do.
    again = run(
        "convert", small_series, "-o", out, "--recipe", out / "recipe.toml", "--masks", "auto", "--jobs", "1", "--json"
    )
    assert again.json["counts"] == {"skipped": 1}


CLASSIC = {"padding": "minus2000-to-0", "align": "corner", "anti_alias": "resize"}
ALL_OFF = {"spacing_mm": "none", "window_hu": "none", "size": "none"}


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        ("--recipe classic", CLASSIC),
        ("--spacing 2", {"spacing_mm": [2.0, 2.0, 2.0]}),
        ("--spacing none --window none --size none", ALL_OFF),
        ("--size 64", {"size": [64, 64]}),
        ("--recipe classic --anti-alias none --order 0", CLASSIC | {"anti_alias": "none", "order": 0}),
        ("--window=-1350,150", {"window_hu": [-1350.0, 150.0]}),
        ("--window -1350,150", {"window_hu": [-1350.0, 150.0]}),
        ("--window none --dtype int16 --compression none", {"window_hu": "none", "dtype": "int16"}),
        ("--policy keep --max-missing 0", {"policy": "keep", "max_missing": 0}),
        ("--assume-hu --orient LPS", {"assume_hu": True, "orient": "LPS"}),
        (
            "--where slices>9 --best-per study --prefer -slices --drop-duplicates",
            {"select": {"where": "slices>9", "best_per": "study", "prefer": "-slices", "drop_duplicates": True}},
        ),
    ],
)
def test_flags_become_fields_of_the_recipe(tmp_path: Path, out: Path, flags: str, changed: dict[str, Any]) -> None:
    # The recipe is resolved and written even for an empty cohort.
    (tmp_path / "empty").mkdir()
    assert run("convert", tmp_path / "empty", "--out", out, *flags.split()).code == 3
    default = {
        "policy": "fix", "spacing_tolerance": 0.01, "position_tolerance_mm": 0.02, "lean_tolerance_mm": 0.1,
        "max_missing": 3, "max_missing_share": 0.1, "assume_hu": False, "group_by": "uid", "orient": "native",
        "padding": "air", "crop": "none", "crop_margin_mm": 10.0, "crop_missing": "whole",
        "spacing_mm": [1.0, 1.0, 1.0], "order": 3, "align": "edge", "anti_alias": "none",
        "window_hu": [-1000.0, 400.0], "size": [512, 512], "fit": "stretch", "dtype": "float32", "format": "tif",
        "compression": "none", "image": True,
        "masks": {
            "aliases": {}, "roi": "none", "layout": "labels", "resampling": "nearest", "threshold": 0.5,
            "text_format": "none", "units": "none", "index_base": "none", "pixel_base": 0, "slice_from": "none",
            "slice_order": "none", "codes": {},
        },
        "select": {"where": "none", "best_per": "none", "prefer": "none", "drop_duplicates": False},
    }  # fmt: skip
    assert tomllib.loads((out / "recipe.toml").read_text()) == default | changed


@pytest.mark.parametrize(
    ("line", "masks", "paths"),
    [
        ("dicom", [], ["dicom"]),
        ("dicom --masks auto", ["auto"], ["dicom"]),
        ("dicom --masks a", ["a"], ["dicom"]),
        ("dicom --masks=a other", ["a"], ["dicom", "other"]),
        ("dicom --masks a --masks b", ["a", "b"], ["dicom"]),
        ("dicom --masks a b c", ["a", "b", "c"], ["dicom"]),
        ("--masks a b -q dicom --masks c", ["a", "b", "c"], ["dicom"]),
        ("--masks a b -- dicom --masks", ["a", "b"], ["dicom", "--masks"]),
    ],
)
def test_masks_may_be_repeated_or_take_several_words(line: str, masks: list[str], paths: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    given = group.commands["convert"].make_context("convert", ["--out", "out", *line.split()]).params
    assert (list(given["masks"] or ()), list(given["paths"])) == (masks, paths)


def test_the_name_of_a_preset_wins_over_a_file_of_that_name(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("classic").write_text("order = 0")
    Path("mine").write_text("order = 0")
    Path("empty").mkdir()
    run("convert", "empty", "--out", out, "--recipe", "classic")
    assert tomllib.loads((out / "recipe.toml").read_text())["order"] == 3
    run("convert", "empty", "--out", out, "--recipe", "mine")
    assert tomllib.loads((out / "recipe.toml").read_text())["order"] == 0


# --- what is printed


def test_json_of_convert_is_one_object_on_standard_output(mixed: Path, out: Path) -> None:
    (mixed / "notes.txt").write_text("no DICOM")
    result = run("convert", mixed, "--out", out, "--json", *SMALL)
    assert result.code == 1
    assert result.stderr == ""
    assert result.json["counts"] == {"ok": 1, "rejected": 1}
    assert result.json["passed_over"] == {"not DICOM": 1}
    assert (result.json["postponed"], result.json["unreadable"]) == (0, [])
    series = {os.path.basename(s["source"]): s for s in result.json["series"]}
    assert series["ct"]["shape"] == [3, 6, 5]
    assert series["ct"]["folder"] == "dicom/ct"
    assert series["gap"]["reason"].startswith("GeometryError: ")
    limited = run("convert", mixed, "--out", out, "--json", *SMALL, "--limit", "1", "--order", "0")
    assert limited.json["counts"] == {"ok": 1, "rejected": 1}


def test_json_of_an_empty_cohort_is_valid(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["scan"], ["convert", "--out", out], ["convert", "--out", out, "--dry-run"]):
        result = run(*command, "--json", tmp_path / "empty")
        assert result.code == 3
        assert result.json["series"] == []


def test_json_of_scan_has_the_planned_actions(mixed: Path) -> None:
    result = run("scan", mixed, "--json")
    assert result.code == 1
    assert result.stderr == ""
    good, bad = sorted(result.json["series"], key=lambda s: s["source"])
    assert (good["action"], good["slices"], good["source_shape"]) == ("convert", 6, [6, 20, 24])
    assert good["source_spacing_mm"] == pytest.approx([2.5, 0.8, 0.7])
    assert good["shape"] == [15, 512, 512]
    assert good["output_bytes"] == 15 * 512 * 512 * 4
    assert (bad["action"], bad["shape"]) == ("reject", None)
    assert bad["reason"].startswith("GeometryError: ")


def test_json_accepts_any_file_name(small_series: Path, tmp_path: Path) -> None:
    folder = os.path.join(tmp_path, os.fsdecode(b"odd-\xff\n\x1b[31m"))
    shutil.copytree(small_series, folder)
    (series,) = run("scan", folder, "--json").json["series"]
    assert "odd-" in series["source"]
    table = run("scan", folder)
    assert table.code == 0
    assert "\x1b[31m" not in table.stdout


def test_quiet_prints_nothing(small_series: Path, out: Path) -> None:
    for flag in ("--quiet", "-q"):
        result = run("convert", small_series, "--out", out, flag, *SMALL)
        assert (result.code, result.stdout, result.stderr) == (0, "", "")


def test_quiet_does_not_mention_a_missing_gpu_with_backend_auto(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run_apart("convert", tmp_path / "empty", "--out", tmp_path / "out", "--quiet", "--backend", "auto")
    assert result.error_line == f"gpuprep: no CT series under {tmp_path / 'empty'}\n"


def test_the_table_of_scan_lists_each_series_and_reason(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuprep.cli.console.PIPE_WIDTH", 400)  # temporary folders have long names
    result = run("scan", mixed, "--recipe", "classic")
    text = plain(result.stdout)
    assert result.code == 1
    became = r"2\.5 × 0\.8 × 0\.7 15 × 512 × 512 0\.02"
    assert re.search(rf"ok series-1-[0-9a-f]{{6}} \S+/dicom/ct axial SPL 6 {became}", text)
    assert re.search(r"rejected series-1-[0-9a-f]{6} \S+/dicom/gap axial SPL 4", text)
    assert "gap: slices are 2.500 mm apart" in text
    assert "2 series: 1 ok, 1 rejected; 0.02 GB to write" in text


def test_the_audit_is_the_same_in_json_and_csv(mixed: Path) -> None:
    good, gap = run("scan", mixed, "--json").json["series"]
    assert (good["action"], good["verdict"], good["codes"], good["reason"]) == ("convert", "ok", [], "")
    assert (gap["action"], gap["verdict"], gap["codes"]) == ("reject", "rejected", ["gap"])
    assert (good["key"], good["slices"], gap["slices"]) == (good["series_uid"], 6, 4)
    assert good["audit"]["spacing_mm"] == pytest.approx(2.5)
    # Files are numbered from the top; the third of five is missing.
    assert gap["audit"]["gaps"] == [{"after": "S1-0004.dcm", "mm": pytest.approx(5.0), "missing": 1}]
    result = run("scan", mixed, "--csv", "-")
    assert result.code == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    for row, record in zip(rows, (good, gap), strict=True):
        assert set(record) - set(row) == {"label", "segmentations", "structures"}
        for name, value in record.items():
            if name not in row:
                continue
            wanted = "" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
            assert row[name] == wanted


def test_json_and_csv_at_once_are_a_bad_request(small_series: Path) -> None:
    result = run("scan", small_series, "--csv", "-", "--json")
    assert result.code == 2
    assert "--csv, --parquet and --json: give one of them" in result.error_line


def test_a_flag_is_no_name_of_a_file(small_series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("scan", small_series, "--csv", "--json")
    assert (result.code, result.error_line) == (
        2,
        "gpuprep: --csv --json: give a name of a file, or - for the terminal\n",
    )
    assert not Path("--json").exists()


def test_scan_writes_a_choice_that_convert_takes(mixed: Path, out: Path, tmp_path: Path) -> None:
    file, table = tmp_path / "choice.csv", tmp_path / "choice.parquet"
    result = run("scan", mixed, "--csv", file)
    assert (result.code, result.stdout) == (1, f"2 series in {file}\n")
    assert run("scan", mixed, "--parquet", table, "--where", "slices > 5").code == 0
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert [(row["action"], row["slices"], row["codes"]) for row in rows] == [
        ("convert", 6, ["ok"][:0]),
        ("exclude", 4, ["where"]),
    ]
    kept = [row for row in csv.reader(file.read_text().splitlines()) if row[0] != "reject"]
    file.write_text("\n".join(",".join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) for row in kept))
    result = run("convert", mixed, "--out", out, "--select", file, *SMALL)
    assert result.code == 0
    assert [row["status"] for row in csv.DictReader((out / "manifest.csv").read_text().splitlines())] == [
        "ok",
        "excluded",
    ]


def test_columns_are_listed_without_a_cohort() -> None:
    result = run("scan", "--columns")
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "slice_thickness_mm real mm (0018,0050) Slice Thickness." in lines
    assert "kernel text (0018,1210) Convolution Kernel, with backslashes." in lines
    assert len(lines) > 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--where", "kernal = 'B30f'"],
            "--where \"kernal = 'B30f'\": there is no column 'kernal'; the nearest are kernel",
        ),
        (["--where", "1; ATTACH 'x' AS y"], "it is no expression of SQL"),
        (["--prefer", "slices"], "select.prefer orders the series of each group: give select.best_per too"),
        (["--best-per", "study", "--prefer", "slice"], "--prefer 'slice': there is no column 'slice'"),
        (["--select", "absent.csv"], "--select absent.csv: No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", ["scan", "convert"])
def test_a_wrong_choice_is_one_line_and_exit_code_2(
    small_series: Path, out: Path, command: str, words: list[str], message: str
) -> None:
    target: list[str | Path] = ["--out", out] if command == "convert" else []
    result = run(command, small_series, *target, *words)
    assert result.code == 2
    assert message in result.error_line
    assert result.error_line.count("\n") == 1


def test_retry_keeps_the_choice(mixed: Path, out: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("path\n" + str(mixed / "gap"))
    assert run("convert", mixed, "--out", out, "--select", listed, "--where", "slices < 9", *SMALL).code == 1
    result = run("retry", out, "--rejected")
    assert result.code == 1
    statuses = {row["source"]: row["status"] for row in csv.DictReader((out / "manifest.csv").read_text().splitlines())}
    assert statuses == {str(mixed / "ct"): "excluded", str(mixed / "gap"): "rejected"}


def test_flags_decide_what_scan_calls_irregular(mixed: Path) -> None:
    def verdicts(*flags: str) -> list[tuple[str, list[str]]]:
        return [(s["verdict"], s["codes"]) for s in run("scan", mixed, "--json", *flags).json["series"]]

    assert verdicts() == [("ok", []), ("rejected", ["gap"])]
    assert verdicts("--max-missing-share", "0.2") == [("ok", []), ("fixed", ["gap"])]
    assert verdicts("--policy", "keep") == [("ok", []), ("ok", ["gap"])]
    assert verdicts("--policy", "strict", "--max-missing-share", "0.2") == [("ok", []), ("rejected", ["gap"])]


def test_the_header_cache_is_where_index_says_and_absent_with_none(small_series: Path, tmp_path: Path) -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"])
    assert run("scan", small_series, "--index", "none").code == 0
    assert list(cache.iterdir()) == []
    assert run("scan", small_series, "--index", tmp_path / "kept" / "index").code == 0
    assert (tmp_path / "kept" / "index").is_file()
    assert list(cache.iterdir()) == []
    assert run("scan", small_series).code == 0
    assert (cache / "gpuprep" / "headers.sqlite").is_file()


def test_tables_can_be_printed_to_an_ascii_terminal(mixed: Path) -> None:
    result = run_apart("scan", mixed, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.code == 1
    assert "reject" in result.stdout


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_closed_pipe_is_not_an_error(small_series: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "gpuprep", "scan", str(small_series), *options]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("streams", [["stderr"], ["stdout", "stderr"]], ids=lambda streams: " and ".join(streams))
def test_exit_code_0_means_done_even_if_the_pipe_is_closed(small_series: Path, out: Path, streams: list[str]) -> None:
    # For example in `gpuprep convert … 2>&1 | head`.
    command = [sys.executable, "-m", "gpuprep", "convert", str(small_series), "--out", str(out), *SMALL]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        gone: dict[str, Any] = dict.fromkeys(streams, closed)
        streams_ = {"stdout": subprocess.DEVNULL} | gone
        done = subprocess.run(command, env=os.environ | LIGHT, **streams_, timeout=60, check=False)
    assert done.returncode != 0 or (out / "dicom" / "ct" / "volume.json").is_file()


def test_a_failing_decoder_prints_no_traceback(tmp_path: Path, out: Path) -> None:
    # pydicom logs the errors of each of its decoders, also in a worker.
    write_series(tmp_path / "dicom", np.zeros((2, 4, 5), np.int16), (2.5, 0.8, 0.7), change=garble)
    done = run_apart("convert", tmp_path / "dicom", "--out", out)
    assert done.code == 1
    text = " ".join(done.stderr.split())  # lines are wrapped
    assert "pixels: S1-0002.dcm (JPEG-LS Lossless Image Compression) cannot be decoded" in text


# --- scan and dry run


@pytest.mark.parametrize("command", ["scan", "dry run"])
def test_scan_and_dry_run_write_nothing_and_read_no_pixels(
    mixed: Path, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_series(mixed / "garbled", np.zeros((3, 4, 4), np.int16), (2.5, 0.8, 0.7), change=garble)
    monkeypatch.setitem(sys.modules, "gpuprep.dicom.read", None)  # importing it raises ImportError
    files = everything(tmp_path)
    args: list[str | Path] = ["scan", mixed] if command == "scan" else ["convert", "--dry-run", mixed, "--out", out]
    result = run(*args, "--json")
    assert result.code == 1
    assert {s["slices"]: s["action"] for s in result.json["series"]} == {6: "convert", 4: "reject", 3: "convert"}
    assert run(*args).code == 1
    assert everything(tmp_path) == files
    assert not out.exists()


def test_a_dry_run_over_earlier_outputs_touches_nothing(mixed: Path, out: Path) -> None:
    run("convert", mixed, "--out", out, *SMALL)
    files = everything(out)
    result = run("convert", mixed, "--out", out, *SMALL, "--dry-run", "--json")
    assert sorted(s["action"] for s in result.json["series"]) == ["reject", "skip"]
    run("convert", mixed, "--out", out, *SMALL, "--dry-run", "--order", "0")
    assert everything(out) == files


# --- demo and doctor


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the cohort of the demo smaller, so that it takes a second."""

    def smaller(make: Any) -> Any:
        # At least 24 slices, because slices 8 to 13 are removed.
        return lambda shape, *others, **named: make((max(24, shape[0] // 4), 16, 18), *others, **named)

    monkeypatch.setattr("gpuprep.cli.demo.thorax", smaller(thorax))
    monkeypatch.setattr("gpuprep.cli.demo.outlines", smaller(outlines))
    monkeypatch.setattr("gpuprep.cli.demo.Recipe", lambda: Recipe(size=(8, 8)))


def test_the_demo_converts_four_series_fixes_one_of_them_and_rejects_one(tmp_path: Path) -> None:
    try:
        result = run("demo", tmp_path)
        assert result.code == 0
        text = plain(result.stdout)
        assert re.search(r"ok 3 120 ", text)
        assert re.search(r"fixed 1 23 ", text)
        assert re.search(r"rejected 1 18 0 0\.00", text)
        looked_at = re.findall(r"\S+\.(?:tif|json|csv)\b", result.stdout)
        assert len(looked_at) == 4
        assert all(Path(p).is_file() for p in looked_at)
        assert len(list((tmp_path / "volumes").rglob("volume.json"))) == 4
        image, labels = (tifffile.imread(p) for p in looked_at if p.endswith("0100.tif"))
        hu = image * 1400 - 1000
        assert hu[labels == 2].mean() > 250  # the spine is bone
        assert 30 < np.median(hu[labels == 1]) < 90  # the heart is not
    finally:
        shutil.rmtree(tmp_path / "volumes", ignore_errors=True)  # half a gigabyte


@pytest.mark.usefixtures("small_demo")
def test_the_demo_can_be_run_again(tmp_path: Path) -> None:
    assert run("demo", tmp_path, "--jobs", "1").code == 0
    result = run("demo", tmp_path, "--jobs", "1")
    assert result.code == 0
    assert "skipped 4" in plain(result.stdout)


@pytest.mark.usefixtures("small_demo")
def test_an_interrupted_demo_continues_when_it_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_series(*args, **options)

    monkeypatch.setattr("gpuprep.cli.demo.write_series", interrupted)
    result = run("demo", tmp_path, "--jobs", "1")
    assert result.code == 130
    assert "run the same command again to continue" in result.stderr
    assert run("demo", tmp_path, "--jobs", "1").code == 0


def test_a_demo_with_unexpected_results_fails(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    result = run("demo", tmp_path, "--jobs", "1")
    assert result.code == 1
    assert "the demo should convert 4 series and reject 1" in result.stderr


def test_a_demo_that_cannot_be_written_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("demo", tmp_path / "file", "--jobs", "1")
    assert result.code == 2
    assert "cannot write into" in result.stderr


def test_doctor_shows_what_works_and_what_to_install() -> None:
    result = run("doctor")
    text = plain(result.stdout)
    assert (result.code, result.stderr) == (0, "")
    assert "ok backend cpu NumPy, SciPy and scikit-image on" in text
    assert f"ok version gpuprep {__version__}" in text
    assert f"ok version numpy {np.__version__}" in text
    assert f"ok version pydicom {pydicom.__version__}" in text
    if find_spec("cupy") is None:
        assert "no backend gpu CuPy is not installed" in text


def test_doctor_finds_a_decoder_for_every_encoding_of_ct() -> None:
    # Trap 30.
    findings = {f["name"]: f for f in run("doctor", "--json").json}
    encodings = [f for f in findings.values() if f["topic"] == "decoder"]
    assert [f["name"] for f in encodings if not f["ok"]] == []
    # RLE, 4 lossy JPEG, 2 lossless JPEG, 2 JPEG-LS, 2 JPEG 2000, 3 HTJ2K, 3 JPEG XL, deflated, uncompressed.
    assert len(encodings) == 19
    assert findings["JPEG 2000 Image Compression"]["detail"]
    assert findings["JPEG XL Lossless"]["detail"]
    assert findings["cpu"]["ok"] is True
