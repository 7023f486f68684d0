"""Describes the output of a series for ``volume.json``."""

from __future__ import annotations

from typing import Any

from gpuprep.core.plan import Plan
from gpuprep.core.versions import versions
from gpuprep.dicom.uids import syntax_name
from gpuprep.output.own_files import SCHEMA
from gpuprep.output.records import SeriesResult
from gpuprep.pipeline.task import Task


def sidecar_of(task: Task, plan: Plan, result: SeriesResult) -> dict[str, Any]:
    """Return the content of ``volume.json``: UIDs and numbers, nothing that names a patient."""
    series = task.planned.series
    placement = plan.placement
    sidecar: dict[str, Any] = {
        "schema": SCHEMA,
        "key": result.key,
        "series_uid": result.series_uid,
        "study_uid": result.study_uid,
        "frame_of_reference_uid": (
            task.names.of_uid("frame", series.frame_of_reference_uid) if task.names else series.frame_of_reference_uid
        ),
        "shape": plan.target.shape,
        "axes": "kji: slices, rows, columns",
        "spacing_mm": plan.target.spacing_mm,
        "affine_lps": plan.target.affine.tolist(),
        "affine_maps": "(k, j, i, 1) of a voxel centre to (x, y, z, 1) in mm, LPS",
        "crop": result.crop,
        "source": {
            "slices": len(series.slices),
            "shape": plan.source.shape,
            "spacing_mm": plan.source.spacing_mm,
            "affine_lps": plan.source.affine.tolist(),
            "placement": placement and placement.to_dict(),
            "transfer_syntaxes": sorted(map(syntax_name, {s.transfer_syntax for s in series.slices})),
        },
        "fingerprint": task.planned.fingerprint,
        "recipe": task.recipe.to_dict(),
        "recipe_sha256": task.recipe.sha256,
        "verdict": result.status,
        "codes": result.codes,
        "irregularities": result.irregularities,
        "warnings": result.warnings,
        "audit": result.audit,
        "engine": task.engine,
        "body": task.backend.body if task.engine == "operators" else None,
        "backend": task.backend.name,
        "device": task.backend.device,
        "versions": versions(task.backend.name == "gpu"),
    }
    if task.recipe.image:
        sidecar["dtype"] = task.recipe.dtype
        sidecar["hu"] = {
            "slope": plan.hu_slope,
            "intercept": plan.hu_intercept,
            "window": task.recipe.window_hu,
            "meaning": "HU = stored · slope + intercept, clipped to the window",
        }
        sidecar["source"] |= {
            "hu_min": result.hu_min,
            "hu_max": result.hu_max,
            "hu_mean": result.hu_mean,
            "padding_share": result.padding_share,
            "quality": result.quality,
        }
    if result.labels is not None:
        sidecar["labels"] = result.labels
        sidecar["segmentations"] = result.segmentations
    return sidecar
