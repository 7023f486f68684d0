"""Writes the report page of an output folder from its manifests and preview pictures.

The page is one self-contained file. Its Content Security Policy (CSP) allows only the embedded script, by hash, and no
requests. Strings from DICOM or the file system are embedded as JSON without ``<``, and the script shows them as text.
The table comes first; the details of each series follow in separate JSON blocks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from gpuprep._version import __version__
from gpuprep.compute.hu_histogram import BANDS, FLAGS, SOURCES, flags
from gpuprep.core.formatting import plain_reason
from gpuprep.errors import OutputError, RequestError
from gpuprep.files import filesystem
from gpuprep.files.replacing import atomic_writer
from gpuprep.output.columns import FACTS, Column
from gpuprep.output.folder_store import Output
from gpuprep.output.object_store import output_for_reading, resolve_out
from gpuprep.output.paths import REPORT
from gpuprep.output.preview import COLOURS
from gpuprep.output.records import SeriesResult, now
from gpuprep.output.verify import AllManifests

MAX_PICTURES = 10_000
"""Maximum number of pictures per page, those of the first series: about 120 MB. Browsers do not open much more."""

PICTURES_PER_BATCH = 64
"""Pictures read in parallel and held in memory together."""

CROP_FLAGS = {
    "crop-not-found": "What the recipe crops to was not found: the series is whole.",
    "crop-partial": "Some of the structures that the recipe crops to are not drawn on the series.",
    "crop-small": "The box of the crop is small for a body or for lungs.",
    "crop-edge": "The body or the lungs reach the border of the field of view.",
}
"""Explanation of codes about crops, beside those of `FLAGS`."""

COLUMNS = (
    "name", "number", "source", "uid", "status", "reason", "slices", "kernel", "spacing_mm", "shape", "hu_min",
    "hu_mean", "hu_max", "air_hu", "tissue_hu", "padding_share", "seconds", "flags",
)  # fmt: skip


def write_report(out: str | Path, to: Path | None = None) -> str:
    """Write the report of an output folder atomically, and return its path.

    Parameters
    ----------
    out : path
        Output folder, on disk or in an object store.
    to : path, optional
        File to write; ``report.html`` in `out` if absent.

    Returns
    -------
    str
        Path or URL of the report.

    Raises
    ------
    RequestError
        If there is no manifest, if `to` is another path inside `out`, or if its folder does not exist.
    OutputError
        If a file cannot be read or written.
    """
    folder = resolve_out(out)
    if to is not None and isinstance(folder, Path):
        file = to.resolve()
        if file != folder.resolve() / REPORT and file.is_relative_to(folder.resolve()):
            raise RequestError(f"{to} lies in the output folder {out}: choose a path outside of it, or omit --to")
    try:
        if to is None and isinstance(folder, Path):
            to = folder / REPORT
        if to is not None:
            _write(out, to)
            return str(to)
        with tempfile.TemporaryDirectory(prefix="gpuprep-") as scratch:
            _write(out, Path(scratch, REPORT))
            filesystem.upload(Path(scratch, REPORT), f"{folder}/{REPORT}")
        return f"{folder}/{REPORT}"
    except OSError as exc:
        raise OutputError(f"cannot write the report of {out}: {exc}") from exc


def _write(out: str | Path, file: Path) -> None:
    with closing(AllManifests(out)) as records:
        if not file.parent.is_dir():
            raise RequestError(f"cannot write {file}: there is no folder {file.parent}")
        with atomic_writer(file) as page:
            _write_page(page, records, output_for_reading(out))


def _write_page(page: TextIO, records: AllManifests, output: Output) -> None:
    """Write the page: the table first, then one block of details per series."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_csp_hash(style)}; script-src {_csp_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    rows: list[list[Any]] = []
    numbers: dict[str, int] = {}
    size = 0
    for result in records:
        numbers[result.key] = len(rows)
        rows.append(_table_row(result))
        size += result.bytes
    cohort = {
        "made": now()[:16].replace("T", " ") + " UTC",
        "made_by": f"gpuprep {__version__}",
        "bytes": size,
        "pictures": MAX_PICTURES,
        "columns": COLUMNS,
        "rows": rows,
        "flags": FLAGS | CROP_FLAGS,
        "bands": BANDS,
        "sources": SOURCES,
        "colours": COLOURS,
    }
    head = _asset("page.html").replace("@POLICY@", policy).replace("@STYLE@", style).replace("@SCRIPT@", script)
    before, _, after = head.partition("@COHORT@")
    middle, _, end = after.partition("@SERIES@")
    page.writelines((before, as_json(cohort), middle))
    for number, block in _detail_blocks(records, numbers, output):
        page.writelines((f'<script type="application/json" id="s{number}">', as_json(block), "</script>\n"))
    page.write(end)


def _table_row(result: SeriesResult) -> list[Any]:
    """Return the table row of a series: one value per column of `COLUMNS`."""
    quality = result.quality or {}
    total_s = result.read_s + result.process_s + result.write_s + (result.masks_s or 0)
    return [
        result.folder or result.source or result.key,
        result.series_number,
        result.source,
        result.series_uid,
        result.status,
        plain_reason(result.reason),
        result.slices,
        result.kernel,
        _rounded(result.source_spacing_mm, 4),
        result.shape,
        _rounded(result.hu_min, 1),
        _rounded(result.hu_mean, 1),
        _rounded(result.hu_max, 1),
        quality.get("air_peak_hu"),
        quality.get("tissue_peak_hu"),
        _rounded(result.padding_share, 4),
        _rounded(total_s, 3) if total_s else None,
        list(dict.fromkeys([*result.codes, *(flag.code for flag in flags(result))])),
    ]


def _detail_blocks(
    records: Iterable[SeriesResult], numbers: dict[str, int], output: Output
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the details of each series with its row number in the table."""
    listed = ((numbers[r.key], r) for r in records if r.key in numbers)  # a concurrent run may have added series
    with ThreadPoolExecutor(8) as threads:  # reading waits for the disk or the network
        while batch := list(islice(listed, PICTURES_PER_BATCH)):
            folders = [r.folder if number < MAX_PICTURES else "" for number, r in batch]
            for (number, result), picture in zip(batch, threads.map(output.preview, folders), strict=True):
                yield number, _detail_block(result, picture)


def _with_unit(value: object, column: Column) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"{text} {column.unit}".rstrip()


def _detail_block(result: SeriesResult, picture: bytes | None) -> dict[str, Any]:
    return {
        "picture": picture and base64.b64encode(picture).decode("ascii"),
        "quality": result.quality,
        "flags": [flag.text for flag in flags(result)],
        "irregularities": result.irregularities,
        "warnings": result.warnings,
        "facts": [
            (name, _with_unit(value, FACTS[name])) for name in FACTS if (value := getattr(result, name)) is not None
        ],
        "labels": [{k: label[k] for k in ("name", "value", "file", "ml")} for label in result.labels or ()],
        "source_shape": result.source_shape,
        "crop": result.crop and _cropped(result.crop),
        "spacing_mm": _rounded(result.spacing_mm, 4),
        "files": result.files,
        "bytes": result.bytes,
        "read_s": _rounded(result.read_s, 3),
        "process_s": _rounded(result.process_s, 3),
        "write_s": _rounded(result.write_s, 3),
        "masks_s": _rounded(result.masks_s, 3),
        "finished": result.finished,
    }


def _cropped(crop: dict[str, Any]) -> str:
    """Return the box of a crop in words."""
    axes = zip(("slices", "rows", "columns"), crop["start"], crop["stop"], strict=True)
    spans = ", ".join(f"{name} {low} to {stop - 1}" for name, low, stop in axes)
    return (
        f"to {crop['to']}, with {crop['margin_mm']:g} mm around it: {spans}, {100 * crop['share']:.2g} % of the voxels"
    )


def _rounded(value: Any, digits: int) -> Any:
    """Return a number, or a list of those in a tuple, rounded to `digits` decimals; None stays None."""
    return [round(v, digits) for v in value] if isinstance(value, tuple) else value and round(value, digits)


def as_json(value: Any) -> str:
    """Return JSON without ``<``, which no element of a page can parse as markup."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("gpuprep.report").joinpath(name).read_text("utf-8")


def _csp_hash(text: str) -> str:
    """Return the CSP source expression that allows an inline script or style with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
