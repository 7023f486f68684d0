"""Runs some cases of ``fuzzing.py``, and checks that the fuzzer detects violations.

GPUPREP_FUZZ_CASES=20000 runs more cases.
"""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from elements import PIXEL_DATA, UNDEFINED, Element, Parsed, built, parsed
from fuzzing import Base, Subject, _again, _fragments, bases, convert_case, fuzz, main, make_case, only, write_case
from numpy.typing import NDArray
from oddities import ODDITIES
from pydicom.encaps import generate_frames

from gpuprep.core.recipe import Recipe
from gpuprep.dicom.headers import read_headers
from gpuprep.pipeline.events import Run

CASES = int(os.environ.get("GPUPREP_FUZZ_CASES", "150"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, ...]:
    return bases(tmp_path_factory.mktemp("bases"))


def test_damaged_series_lead_to_a_verdict(tmp_path: Path) -> None:
    summary = fuzz(range(CASES), seed=1, keep=tmp_path)
    assert summary.skipped == {}
    assert summary.cases == CASES
    assert not summary.violations, f"files are in {tmp_path}"


def test_damaged_headers_are_read_from_their_bytes_as_pydicom_reads_them_or_left_to_it(
    stock: tuple[Base, ...], tmp_path: Path
) -> None:
    for number in range(CASES):
        folder = tmp_path / str(number)
        write_case(make_case(stock, 2, number), folder)
        files = [str(file) for file in sorted(folder.rglob("*")) if file.is_file()]
        assert len(read_headers(files)) == len(files)  # `both_ways` compares


def test_splitting_and_assembling_a_file_restores_its_bytes(stock: tuple[Base, ...]) -> None:
    for base in stock:
        for _, data in base.files:
            assert built(parsed(data)) == data, base.name


def test_cases_are_reproducible(stock: tuple[Base, ...], tmp_path: Path) -> None:
    again = bases(tmp_path)
    assert again == stock
    for number in range(100):
        assert make_case(again, 3, number) == make_case(stock, 3, number)
    # Independent of the cases made before.
    assert make_case(stock, 3, 7) == make_case(again, 3, 7)


def test_cases_cover_all_oddities_and_do_not_change_their_bases(stock: tuple[Base, ...]) -> None:
    before = [(base.name, [(name, zlib.crc32(data)) for name, data in base.files]) for base in stock]
    done = Counter(what.split(":")[0] for n in range(700) for what in make_case(stock, 20261129, n).done)
    assert {oddity.name for oddity in ODDITIES} <= set(done)
    assert before == [(base.name, [(name, zlib.crc32(data)) for name, data in base.files]) for base in stock]


@pytest.mark.parametrize("left", [b"", b"\xfe", b"\xfe\xff\x00\xe0\0\0\0"])
def test_almost_empty_encapsulated_pixels_can_be_damaged_further(left: bytes) -> None:
    done = set()
    for n in range(100):
        pixels = Element(PIXEL_DATA, b"OB", left, length=UNDEFINED)
        done.add(_fragments(_again(n), Parsed(b"", [], [pixels], False, False, False)))
    assert len(done) == 8  # all kinds


def read(stock: tuple[Base, ...], name: str) -> list[pydicom.Dataset]:
    (base,) = [base for base in stock if base.name == name]
    return [pydicom.dcmread(io.BytesIO(data)) for _, data in base.files]


def inflated(frame: bytes) -> bytes:
    return zlib.decompress(frame, -zlib.MAX_WBITS)


@pytest.mark.parametrize(
    ("name", "syntax", "decode"),
    [
        ("jpeg-xl", "1.2.840.10008.1.2.4.110", imagecodecs.jpegxl_decode),
        ("deflated-frames", "1.2.840.10008.1.2.8.1", inflated),
        ("uncompressed-frames", "1.2.840.10008.1.2.1.98", bytes),
    ],
)
def test_bases_with_unusual_encodings_have_the_values_of_the_native_base(
    stock: tuple[Base, ...], name: str, syntax: str, decode: Any
) -> None:
    plain = read(stock, "explicit-unsigned")
    encoded = read(stock, name)
    assert len(encoded) == len(plain) == 3
    for ds, expected in zip(encoded, plain, strict=True):
        assert ds.file_meta.TransferSyntaxUID == syntax
        (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
        assert np.asarray(decode(frame)).tobytes() == expected.PixelData


def test_the_base_with_two_phases_has_every_frame_twice(stock: tuple[Base, ...]) -> None:
    (one,), (two,) = read(stock, "enhanced"), read(stock, "enhanced-4d")
    assert (one.NumberOfFrames, two.NumberOfFrames) == (4, 8)
    assert two.PixelData == one.PixelData * 2
    frames = two.PerFrameFunctionalGroupsSequence
    z_mm = [float(frame.PlanePositionSequence[0].ImagePositionPatient[2]) for frame in frames]
    assert z_mm == [-300, -297.5, -295, -292.5] * 2
    phases = [frame.RespiratorySynchronizationSequence[0].NominalPercentageOfRespiratoryPhase for frame in frames]
    assert phases == [0] * 4 + [30] * 4


def odd(stock: tuple[Base, ...], name: str, base: str, seed: int) -> tuple[str, dict[str, bytes]]:
    """Return the description and the files of a base changed by one oddity."""
    (oddity,) = [oddity for oddity in ODDITIES if oddity.name == name]
    (of,) = [b for b in stock if b.name == base]
    series = {file: parsed(data) for file, data in of.files}
    return oddity.do(_again(seed), series), {file: built(apart) for file, apart in series.items()}


def test_the_oddity_of_the_codestream_sign_contradicts_the_header(stock: tuple[Base, ...]) -> None:
    signs = set()
    for seed in range(12):
        _, files = odd(stock, "sign of the codestream", "explicit-unsigned", seed)
        for data in files.values():
            ds = pydicom.dcmread(io.BytesIO(data))
            if ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.90":
                (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
                decoded: NDArray[np.integer] = imagecodecs.jpeg2k_decode(frame)
                signs.add((ds.PixelRepresentation, decoded.dtype.kind))
    assert signs == {(0, "i"), (1, "u")}


def test_the_oddity_of_the_pixel_vr_writes_the_described_bytes(stock: tuple[Base, ...]) -> None:
    seen = set()
    for seed in range(40):
        said, files = odd(stock, "pixel VR", "explicit-signed", seed)
        vr, reserved = said.removeprefix("pixels as ").split(", reserved ")
        head = b"\xe0\x7f\x10\x00" + vr.encode() + bytes.fromhex(reserved)
        assert any(head in data for data in files.values())
        seen.add(vr)
    assert seen == {"OB", "OW", "UN", "OF", "OL", "OD", "OV", "UT"}


def test_the_oddity_of_passes_writes_the_described_positions(stock: tuple[Base, ...]) -> None:
    for seed in range(12):
        said, files = odd(stock, "passes", "explicit-signed", seed)
        count, share = int(said.split()[0]), float(said.split()[2])
        z_mm = {round(float(pydicom.dcmread(io.BytesIO(data)).ImagePositionPatient[2]), 6) for data in files.values()}
        assert 4 < len(files) <= 4 * count
        assert z_mm <= {round(-300 + 2.5 * (k + n * share), 6) for k in range(4) for n in range(count)}
        uids = {pydicom.dcmread(io.BytesIO(data)).SOPInstanceUID for data in files.values()}
        assert len(uids) == len(files)


@pytest.fixture(scope="module")
def broken(stock: tuple[Base, ...]) -> tuple[Base, ...]:
    """The witness, and a base that is no DICOM: only its bytes can be damaged, not its elements."""
    return stock[0], Base("explicit-signed", (("a.dcm", b"x"),))


def test_a_case_that_cannot_be_made_is_skipped_and_counted(
    broken: tuple[Base, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = set()
    for number in range(12):
        try:
            make_case(broken, 1, number)
        except (struct.error, IndexError):  # no elements, or no base for the oddity
            impossible.add(number)
    assert 0 < len(impossible) < 12
    monkeypatch.setattr("fuzzing.bases", lambda _: broken)
    argv = [
        "fuzz",
        "--cases",
        "12",
        "--seed",
        "1",
        "--jobs",
        "1",
        "--limit",
        "60",
        "--out",
        str(tmp_path / "said.json"),
    ]
    monkeypatch.setattr("sys.argv", argv)
    assert main() == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert (said["cases"], {int(n) for n in said["skipped"]}) == (12 - len(impossible), impossible)
    assert {reason.split(":")[0] for reason in said["skipped"].values()} <= {"error", "IndexError"}
    assert f"\nskipped, since they could not be made: {len(impossible)}\n" in capsys.readouterr().out
    assert only(1, min(impossible), tmp_path, 60) == 1
    assert f"case {min(impossible)} of seed 1 cannot be made: " in capsys.readouterr().out


# Violations. Child processes run them, so they are functions of a module.

VIOLATIONS = ("exception", "traceback", "memory", "failed", "reason", "witness", "input", "silence")
NEXT_VIOLATION = iter(VIOLATIONS)


def violates(folder: Path, out: Path, recipe: Recipe) -> Run:
    """Convert with the next violation."""
    kind = next(NEXT_VIOLATION)
    if kind == "exception":
        raise RuntimeError("a bug")
    if kind == "traceback":
        os.write(2, b"Traceback (most recent call last):\n")
    if kind == "memory":
        bytes(5 << 30)
    run = convert_case(folder / "witness" if kind == "silence" else folder, out, recipe)
    if kind == "failed":
        return replace(run, results=tuple(replace(r, status="failed", reason="KeyError: 7") for r in run.results))
    if kind == "reason":
        return replace(run, results=tuple(replace(r, status="rejected", reason="") for r in run.results))
    if kind == "witness":
        for file in out.rglob("volume.tif"):
            file.write_bytes(file.read_bytes() + b"\0")
    if kind == "input":
        (folder / "witness" / "left-behind").touch()
    return run


def hangs(folder: Path, out: Path, recipe: Recipe) -> Run:
    time.sleep(600)
    return convert_case(folder, out, recipe)


def dies(folder: Path, out: Path, recipe: Recipe) -> Run:
    os.kill(os.getpid(), signal.SIGSEGV)
    return convert_case(folder, out, recipe)


@pytest.fixture(scope="module")
def mild(stock: tuple[Base, ...]) -> list[int]:
    """Cases in which the damaged series is found, with any verdict."""
    found = [n for n in range(300) if all(what.startswith("codestream") for what in make_case(stock, 0, n).done)]
    return found[: len(VIOLATIONS)]


def test_violations_are_detected(mild: list[int]) -> None:
    summary = fuzz(mild, subject=violates)
    assert summary.cases == len(VIOLATIONS)
    for number, kind in zip(mild, VIOLATIONS, strict=True):
        assert kind in {v.kind for v in summary.violations if v.case == number}


@pytest.mark.parametrize(
    ("subject", "limit_s", "kind", "detail"), [(hangs, 1.0, "hang", "in hangs"), (dies, 10.0, "death", "SIGSEGV")]
)
def test_a_child_that_hangs_or_dies_is_detected_and_replaced(
    subject: Subject, limit_s: float, kind: str, detail: str, mild: list[int], tmp_path: Path
) -> None:
    summary = fuzz(mild[:2], limit_s=limit_s, subject=subject, keep=tmp_path)
    assert [(v.case, v.kind) for v in summary.violations] == [(number, kind) for number in mild[:2]]
    assert all(detail in v.detail for v in summary.violations)
    assert {f.name for f in tmp_path.iterdir()} == {f"case-0-{number}" for number in mild[:2]}
