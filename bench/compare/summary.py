"""Summarises the runs of a comparison: medians, ratios, and the share of gpuprep's time that its stages account for."""

from __future__ import annotations

import re
import statistics
from typing import Any

from bench.compare.contenders import Contender


def summarise(records: dict[str, dict[str, Any]], all_: list[Contender]) -> None:
    """Add medians, ratios and stage times to each record. Ratios are medians of the ratios in the same round."""
    for contender in all_:
        record = records[contender.name]
        runs = record.get("runs", [])
        if not runs:
            continue
        per_series_s = _per_series_s(record)
        seconds_per_series = statistics.median(per_series_s)
        record |= {
            "seconds_per_series": seconds_per_series,
            "seconds_per_series_range": [min(per_series_s), max(per_series_s)],
            "series_per_hour": 3600 / seconds_per_series,
            "cold_s": statistics.median(r["cold_s"] for r in runs),
            "cpu_s_per_series": statistics.median(r["cpu_s"] / r["series"] for r in runs),
            "mb_per_s_in": statistics.median(r["bytes_in"] / r["seconds"] for r in runs) / 1e6,
            "mb_per_s_out": statistics.median(r["bytes_out"] / r["seconds"] for r in runs) / 1e6,
        }
        splits = [r["split"] for r in runs if "split" in r]
        if splits:
            split = {stage: statistics.fmean(s[stage] for s in splits) for stage in splits[0]}
            record["split"] = split | {"accounted_share": accounted_share(split, runs, contender.jobs)}
    for contender in all_:
        against = contender.against or f"gpuprep, {contender.dtype}"
        for key, other in (("ratio_to_gpuprep", against), ("ratio_to_floor", f"floor, {contender.floor}")):
            mine = records[contender.name]
            pairs = zip(_per_series_s(mine), _per_series_s(records.get(other, {})), strict=False)
            ratios = [mine_s / theirs_s for mine_s, theirs_s in pairs]
            if ratios:
                mine |= {key: statistics.median(ratios), f"{key}_range": [min(ratios), max(ratios)]}


def _per_series_s(record: dict[str, Any]) -> list[float]:
    """Return the seconds per series of each round."""
    return [run["seconds"] / run["series"] for run in record.get("runs", [])]


def accounted_share(split: dict[str, float], runs: list[dict[str, Any]], jobs: int) -> float:
    """Return the share of the wall time that the stages account for: the scan, then `jobs` series at a time.

    Times on a device are not added, because they overlap these stages.
    """
    series = runs[0]["series"]
    stages_s = split["read_s"] + split["process_s"] + split["write_s"]
    accounted_s: float = split["scan_s"] + stages_s * series / min(jobs, series)
    return accounted_s / statistics.fmean(r["seconds"] for r in runs)


def without_paths(text: str) -> str:
    """Return the text on one line, with absolute paths cut to their last part to keep local folders out of results."""
    return re.sub(r"""(?<![\w.…/])/(?:[^\s/'"]+/)*([^\s/'"]+)/?""", r"…/\1", " ".join(text.split()))
