"""Measures the cost of the report: collecting metrics and pictures during conversion, and opening a long page.

    python -m bench.micro.quality [--series 5000] [--repeats 9] [--out bench/results/quality-….json]

One series of 108 × 512 × 512 at 3 × 0.6816 × 0.6816 mm is converted in this process by the default recipe, alternately
with and without collecting, so that both run under the same load. The time spent in the collecting functions is summed.
Then a report of many synthetic series with pictures is written, and opened in headless Chromium if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gpuprep
from bench.measure import save
from gpuprep.compute.hu_histogram import Histogram
from gpuprep.core.recipe import Dtype, Recipe
from gpuprep.dicom import read
from gpuprep.output.manifest import Manifest
from gpuprep.output.preview import MiddlePlanes
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline import convert_series
from gpuprep.report.html import write_report
from gpuprep.testing import thorax, write_series

SHAPE, SPACING_MM = (108, 512, 512), (3.0, 0.6816, 0.6816)
COLLECTING: tuple[tuple[Any, str, Any], ...] = (
    (read, "sampled", np.empty(0)), (Histogram, "add", None), (Histogram, "to_dict", None),
    (MiddlePlanes, "take", None),
    (convert_series, "_write_preview", None),
)  # fmt: skip
"""Functions that collect metrics and pictures: owner, name, and a return value for runs without collecting."""


@contextlib.contextmanager
def patched(replacement: Callable[[Callable[..., Any], Any], Callable[..., Any]]) -> Iterator[None]:
    """Patch the collecting functions with ``replacement(function, return value without collecting)``."""
    with contextlib.ExitStack() as patches:
        for owner, name, empty in COLLECTING:
            patches.enter_context(mock.patch.object(owner, name, replacement(getattr(owner, name), empty)))
        yield


def timed_conversion(dicom: Path, out: Path, dtype: Dtype) -> tuple[float, SeriesResult]:
    """Convert a series; return the seconds, scan included, and the result."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    (result,) = gpuprep.convert(dicom, out, Recipe(dtype=dtype), backend="cpu").results
    if result.status != "ok":
        raise SystemExit(f"{result.status}: {result.reason}")
    return time.perf_counter() - started, result


def cost(scratch: Path, dtype: Dtype, repeats: int) -> dict[str, float]:
    """Return the seconds of a conversion with and without collecting, and those spent in collecting functions."""
    spent = 0.0

    def timed(function: Callable[..., Any], _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent += time.perf_counter() - started

        return run

    with_s, without_s, collecting_s = [], [], []
    for n in range(repeats + 1):
        spent = 0.0
        with patched(timed):
            collecting_run_s, _ = timed_conversion(scratch / "dicom", scratch / "out", dtype)
        with patched(lambda _, empty: lambda *_: empty):
            plain_run_s, _ = timed_conversion(scratch / "dicom", scratch / "out", dtype)
        if n:  # the first round imports, compiles and fills caches
            with_s.append(collecting_run_s)
            without_s.append(plain_run_s)
            collecting_s.append(spent)
    return {
        "with_s": statistics.median(with_s),
        "without_s": statistics.median(without_s),
        "difference_s": statistics.median(a - b for a, b in zip(with_s, without_s, strict=True)),
        "collecting_s": statistics.median(collecting_s),
        "share": statistics.median(c / w for c, w in zip(collecting_s, with_s, strict=True)),
    }


def make_output_folder(out: Path, template: SeriesResult, picture: bytes, series: int) -> None:
    """Make an output folder, without volumes, of many series that vary a template."""
    with closing(Manifest(out / "manifest.sqlite")) as manifest, manifest._transaction():
        for n in range(series):
            folder = f"patient-{n // 3:05d}/series-{n % 3}"
            (out / folder).mkdir(parents=True)
            (out / folder / "preview.jpg").write_bytes(picture)
            manifest.put(
                replace(
                    template, key=f"1.2.{n}", series_uid=f"1.2.{n}", source=f"/dicom/{folder}", folder=folder,
                    slices=60 + n * 7 % 240, hu_mean=-700.0 + n % 311, read_s=0.2 + n % 17 / 20,
                    source_spacing_mm=(1.0 + n % 5 / 2, 0.5 + n % 40 / 100, 0.5 + n % 40 / 100),
                )
            )  # fmt: skip


def browser_times_s(page: Path) -> dict[str, float] | None:
    """Return the seconds to first paint, full load, sorting and filtering in Chromium; None if it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        return None
    from selenium import webdriver

    found = []
    for _ in range(3):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            for switch in (
                "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                "disable-background-networking", "disable-component-update", "disable-sync",
                f"user-data-dir={profile}",
            ):  # fmt: skip
                options.add_argument(f"--{switch}")
            with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
                browser.get(page.as_uri())
                found.append(browser.execute_script(_MEASURE_PAGE))
    return {key: statistics.median(f[key] / 1000 for f in found) for key in found[0]}


_MEASURE_PAGE = """
const timed = (act) => {
  const started = performance.now();
  act();
  document.body.offsetHeight;
  return performance.now() - started;
};
const paint = performance.getEntriesByName("first-contentful-paint")[0];
const page = performance.getEntriesByType("navigation")[0];
const button = [...document.querySelectorAll("thead button")].find((b) => b.textContent === "Slices");
const status = document.querySelector("#statuses button");
return {
  first_contentful_paint_s: paint.startTime, whole_page_s: page.domContentLoadedEventEnd,
  sort_s: timed(() => button.click()), filter_s: timed(() => status.click()),
};
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=int, default=5000, help="number of series in the report")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    try:
        write_series(scratch / "dicom", thorax(SHAPE, SPACING_MM), SPACING_MM)
        costs: dict[str, dict[str, float]] = {}
        dtypes: tuple[Dtype, ...] = ("float32", "uint8")
        for dtype in dtypes:
            costs[dtype] = c = cost(scratch, dtype, args.repeats)
            print(
                f"{dtype:8} {c['with_s']:.3f} s with collecting, {c['without_s']:.3f} s without; "
                f"{c['collecting_s'] * 1e3:.1f} ms are spent collecting, {c['share']:.1%}",
                flush=True,
            )
        _, template = timed_conversion(scratch / "dicom", scratch / "out", "uint8")
        picture = (scratch / "out" / template.folder / "preview.jpg").read_bytes()
        (scratch / "many").mkdir()
        make_output_folder(scratch / "many", template, picture, args.series)
        started = time.perf_counter()
        page = Path(write_report(scratch / "many"))
        report = {"write_s": time.perf_counter() - started, "bytes": page.stat().st_size}
        print(f"{args.series} series: {report['bytes'] / 1e6:.1f} MB, written in {report['write_s']:.2f} s", flush=True)
        browser = browser_times_s(page)
        print("no browser" if browser is None else ", ".join(f"{key} {value:.2f}" for key, value in browser.items()))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    figures = {
        "shape": SHAPE,
        "repeats": args.repeats,
        "collecting": costs,
        "series": args.series,
        "picture_bytes": len(picture),
        "report": report,
        "browser": browser,
    }
    save(args.out, "bench.micro.quality", figures)


if __name__ == "__main__":
    main()
