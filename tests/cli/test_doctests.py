"""Every public name has an example, and every example is correct, in an empty folder."""

from __future__ import annotations

import doctest
from inspect import cleandoc
from pathlib import Path

import pytest

import gpuprep

NAMES = [name for name in gpuprep.__all__ if name != "__version__"]
FINDER = doctest.DocTestFinder(recurse=False)


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling loops would take longer than all examples


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_public_names_are_correct(name: str) -> None:
    (example,) = FINDER.find(getattr(gpuprep, name), name, globs={"gpuprep": gpuprep})
    assert "\nExamples\n--------\n>>> " in cleandoc(getattr(gpuprep, name).__doc__)
    run(example)


def test_the_example_of_the_package_is_correct() -> None:
    (example,) = FINDER.find(gpuprep, "gpuprep", globs={})
    run(example)


def run(example: doctest.DocTest) -> None:
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=failures.append)
    assert example.examples
    assert failures == [], "".join(failures)
