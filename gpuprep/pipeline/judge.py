"""Judges from headers alone whether a series can be converted."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import basename
from typing import NamedTuple

from gpuprep.core.formatting import printable
from gpuprep.core.plan import CROP_NOT_FOUND, Plan, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.dicom.audit import Audit
from gpuprep.errors import PlanError
from gpuprep.pipeline.segmentation_files import SegmentationSummary


class Judgement(NamedTuple):
    """The plan of a series, or the reason why it is rejected."""

    plan: Plan | None = None
    reason: str = ""
    """"Error: text"."""
    code: str = ""
    """Code of a reason that is not in the audit."""


def judge(audited: Audit, recipe: Recipe, segmentations: Sequence[SegmentationSummary]) -> Judgement:
    """Return the plan of an audited series with its segmentations, or why it is rejected."""
    if audited.stack is None:
        return Judgement(reason=audited.reason)
    try:
        plan = make_plan(audited.stack.geometry, recipe, audited.stack.placement)
    except PlanError as exc:
        return Judgement(reason=f"PlanError: {exc}", code=exc.code)
    if bad := next((s for s in segmentations if s.error), None):
        return Judgement(reason=f"SegmentationError: {printable(basename(bad.path))}: {bad.error}", code=bad.code)
    if recipe.crop_kind == "mask" and recipe.crop_missing == "reject" and not segmentations:
        text = f"PlanError: it has no segmentation, and crop = {recipe.crop!r}"
        return Judgement(reason=text, code=CROP_NOT_FOUND)
    return Judgement(plan)
