"""Damaged series through gpuprep: a small part of ``python -m bench.fuzz``, and whether that sees what it looks for.

GPUPREP_FUZZ_CASES=20000 runs more of them.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench.fuzz import Base, Subject, bases, built, convert_case, fuzz, make_case, parsed
from gpuprep.recipe import Recipe
from gpuprep.runs import Run

CASES = int(os.environ.get("GPUPREP_FUZZ_CASES", "150"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, ...]:
    return bases(tmp_path_factory.mktemp("bases"))


def test_damaged_series_end_in_a_verdict(tmp_path: Path) -> None:
    summary = fuzz(range(CASES), seed=1, keep=tmp_path)
    assert summary.cases == CASES
    assert not summary.violations, f"files are in {tmp_path}"


def test_files_are_put_together_as_they_were(stock: tuple[Base, ...]) -> None:
    for base in stock:
        for _, data in base.files:
            assert built(parsed(data)) == data, base.name


def test_a_case_is_always_the_same(stock: tuple[Base, ...], tmp_path: Path) -> None:
    again = bases(tmp_path)
    assert again == stock
    for number in range(100):
        assert make_case(again, 3, number) == make_case(stock, 3, number)


# What gpuprep must not do. Children run it, so it has to be in functions of a module.

SINS = ("exception", "traceback", "memory", "failed", "reason", "witness", "input", "silence")
TO_COMMIT = iter(SINS)


def sins(folder: Path, out: Path, recipe: Recipe) -> Run:
    """Commit one sin after the other."""
    sin = next(TO_COMMIT)
    if sin == "exception":
        raise RuntimeError("a bug")
    if sin == "traceback":
        os.write(2, b"Traceback (most recent call last):\n")
    if sin == "memory":
        bytes(5 << 30)
    run = convert_case(folder / "witness" if sin == "silence" else folder, out, recipe)
    if sin == "failed":
        return replace(run, results=tuple(replace(r, status="failed", reason="KeyError: 7") for r in run.results))
    if sin == "reason":
        return replace(run, results=tuple(replace(r, status="rejected", reason="") for r in run.results))
    if sin == "witness":
        for file in out.rglob("volume.tif"):
            file.write_bytes(file.read_bytes() + b"\0")
    if sin == "input":
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
    """Cases in which the damaged series is found, whatever becomes of it."""
    found = [n for n in range(300) if all(what.startswith("codestream") for what in make_case(stock, 0, n).done)]
    return found[: len(SINS)]


def test_violations_are_seen(mild: list[int]) -> None:
    summary = fuzz(mild, subject=sins)
    assert summary.cases == len(SINS)
    for number, sin in zip(mild, SINS, strict=True):
        assert sin in {v.kind for v in summary.violations if v.case == number}


@pytest.mark.parametrize(
    ("subject", "limit_s", "kind", "detail"), [(hangs, 1.0, "hang", "in hangs"), (dies, 10.0, "death", "SIGSEGV")]
)
def test_a_lost_child_is_seen_and_replaced(
    subject: Subject, limit_s: float, kind: str, detail: str, mild: list[int], tmp_path: Path
) -> None:
    summary = fuzz(mild[:2], limit_s=limit_s, subject=subject, keep=tmp_path)
    assert [(v.case, v.kind) for v in summary.violations] == [(number, kind) for number in mild[:2]]
    assert all(detail in v.detail for v in summary.violations)
    assert {f.name for f in tmp_path.iterdir()} == {f"case-0-{number}" for number in mild[:2]}
