"""Prints the results of a comparison as a table and draws them as a chart.

``python -m bench.compare.report RESULT.json`` prints the table in Markdown and draws the chart next to the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.compare.contenders import NOT_FLUSHED

Record = dict[str, Any]

COLUMNS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("s/series", lambda r: _number(r, "seconds_per_series")),
    ("min–max", lambda r: _range(r, "seconds_per_series_range")),
    ("series/h", lambda r: _number(r, "series_per_hour", ".0f")),
    ("× gpuprep", lambda r: _number(r, "ratio_to_gpuprep")),
    ("min–max", lambda r: _range(r, "ratio_to_gpuprep_range")),
    ("× floor", lambda r: _number(r, "ratio_to_floor")),
    ("cold, s", lambda r: _number(r, "cold_s")),
    ("CPU s/series", lambda r: _number(r, "cpu_s_per_series")),
    ("MB/s in", lambda r: _number(r, "mb_per_s_in")),
    ("MB/s out", lambda r: _number(r, "mb_per_s_out")),
    ("peak MB", lambda r: _number(r, "peak_bytes", ".0f", 1e-6)),
    ("largest process MB", lambda r: _number(r, "largest_process_bytes", ".0f", 1e-6)),
    ("predicted MB", lambda r: _number(r, "predicted_process_bytes", ".0f", 1e-6)),
    ("largest Δ HU", lambda r: _difference(r)),
    ("equal files", lambda r: f"{r['equal_files']} of {r['files']}" if "files" in r else ""),
    ("timed", lambda r: _timed(r)),
)
STAGES = ("scan_s", "read_s", "process_s", "write_s", "accounted_share", "upload_s", "kernels_s", "download_s")
GPUPREP_COLOUR, OTHER_COLOUR, CONVERTER_COLOUR = "#0b6e4f", "#9aa5b1", "#d5dbe1"
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def _number(record: Record, key: str, form: str = ".3g", factor: float = 1) -> str:
    if record.get(key) is None:
        return ""
    text = f"{record[key] * factor:{form}}"
    return f"{float(text):.0f}" if "e" in text else text


def _range(record: Record, key: str) -> str:
    return "–".join(f"{value:.3g}" for value in record.get(key, ()))


def _difference(record: Record) -> str:
    if "largest_difference_inside_hu" not in record:
        return "other shape" if "shape" in record else ""
    sign = "" if record["agrees"] else " (!)"
    return f"{record['largest_difference_inside_hu']:.2g}" + sign


def _timed(record: Record) -> str:
    runs = record.get("runs", [])
    return f"{len(runs)} × {runs[0]['series']}" if runs else ""


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Return a header row and one row per contender, without columns that are empty in all of these."""
    lines = [["contender", *(name for name, _ in COLUMNS), "note"]]
    for name, record in result["contenders"].items():
        note = record.get("note", "") if record["status"] == "ok" else f"{record['status']}: {record['reason']}"
        lines.append([name, *(cell(record) for _, cell in COLUMNS), note])
    filled = [k for k, column in enumerate(zip(*lines[1:], strict=True)) if any(column)]
    return [[line[k] for k in filled] for line in lines]


def split_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the times of gpuprep's stages: the scan in total, the other stages per series."""
    lines = [["mean per series; scan in total", *(s.removesuffix("_s").replace("_", " ") for s in STAGES)]]
    for name, record in result["contenders"].items():
        if "split" in record:
            lines.append([name, *(_number(record["split"], stage) for stage in STAGES)])
    return lines


def _tables(result: dict[str, Any]) -> list[list[list[str]]]:
    return [lines for lines in (rows(result), split_rows(result)) if len(lines) > 1]


def table(result: dict[str, Any]) -> str:
    """Return the tables as plain text with aligned columns."""
    return "\n\n".join("\n".join(_aligned(lines)) for lines in _tables(result))


def markdown(result: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    return "\n\n".join("\n".join(_markdown_rows(lines)) for lines in _tables(result))


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def _markdown_rows(lines: list[list[str]]) -> list[str]:
    header, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return [header, "|---" * len(lines[0]) + "|", *rest]


def chart(result: dict[str, Any], file: Path) -> None:
    """Draw bars of seconds per series, the fastest on top, and the flushed floors as vertical lines."""
    from matplotlib.figure import Figure

    timed = {
        name: record
        for name, record in result["contenders"].items()
        if "seconds_per_series" in record and not name.endswith(NOT_FLUSHED)
    }
    floors = {n: r["seconds_per_series"] for n, r in timed.items() if n.startswith("floor")}
    bars = sorted(((n, r) for n, r in timed.items() if n not in floors), key=lambda b: -b[1]["seconds_per_series"])
    if not bars:
        return
    names = [name for name, _ in bars]
    seconds = [record["seconds_per_series"] for _, record in bars]
    colours = [
        GPUPREP_COLOUR if n.startswith("gpuprep") else CONVERTER_COLOUR if r["dtype"] == "source" else OTHER_COLOUR
        for n, r in bars
    ]

    figure = Figure(figsize=(9, 0.32 * len(bars) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, seconds, color=colours, height=0.72)
    for y, value in enumerate(seconds):
        axes.text(
            value * 1.04,
            y,
            f"{value:.2g}" if value < 10 else f"{value:.0f}",
            va="center",
            fontsize=8,
            bbox=LABEL,
            zorder=3,
        )
    for (name, value), style in zip(floors.items(), ("-", "--", ":"), strict=False):
        axes.axvline(value, color="#b3261e", linewidth=1, linestyle=style, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min([*seconds, *floors.values()]) / 1.6, max(seconds) * 1.6)
    axes.set_xlabel("seconds per series, disk to disk (logarithmic; shorter is better)")
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if floors:
        axes.legend(loc="upper right", fontsize=8, frameon=False)
    machine, cohort = result["machine"], result["cohort"]
    size = " × ".join(map(str, cohort["phantoms"])) + " phantoms" if cohort["phantoms"] else "real series"
    axes.set_title(f"{size}, {machine['cores']} cores, {machine['cpu']}", fontsize=9, loc="left")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    file = parser.parse_args().result
    result = json.loads(file.read_text())
    print(markdown(result))
    chart(result, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
