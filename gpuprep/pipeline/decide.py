"""Decides what happens to each series, from its headers and the manifest; nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from os.path import basename
from typing import Literal, NamedTuple

from gpuprep import _version
from gpuprep.compute.backend import Backend, Engine
from gpuprep.compute.memory_estimate import WRITING_BYTES, mask_bytes, needed_bytes
from gpuprep.core.formatting import printable
from gpuprep.core.plan import Plan, make_plan
from gpuprep.core.recipe import Recipe
from gpuprep.core.series import Series
from gpuprep.core.stacking_rules import SeriesWarning, codes
from gpuprep.dicom.audit import Audit, Verdict, audit
from gpuprep.dicom.discover import Cohort
from gpuprep.errors import PlanError
from gpuprep.output.folder_store import Output
from gpuprep.output.manifest import Manifest
from gpuprep.output.paths import layout
from gpuprep.output.records import DONE, Entry
from gpuprep.pipeline.match_masks import Matched, fingerprint, used_names
from gpuprep.pipeline.pseudonyms import Pseudonyms
from gpuprep.pipeline.segmentation_files import Glimpse


class Needs(NamedTuple):
    """What the conversion of one series takes."""

    output_bytes: int
    """Of its voxels on disk, uncompressed."""
    memory_bytes: int
    """At one time, where it is computed."""
    voxels: int
    """Read and written: time goes with them."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What would happen to one series, from its headers alone."""

    series: Series
    action: Literal["convert", "skip", "reject"]
    folder: str
    """Relative to OUT."""
    plan: Plan | None
    audit: Audit | None = None
    """Absent for a series that is skipped: nothing about it has changed."""
    reason: str = ""
    code: str = ""
    """Of that reason, if it is not in the headers."""
    fingerprint: str = ""
    """Of its input, as it may be kept: see `fingerprint_in_out`."""
    label_values: tuple[tuple[str, int], ...] = ()
    """Of the structures in its segmentations, where they share a volume."""
    former: Entry | None = None
    """What the manifest has of it."""
    segmentations: tuple[Glimpse, ...] = ()
    """What masks would be made of …"""
    structures: tuple[str, ...] = ()
    """… and of what in them, by the names that are used."""

    @property
    def verdict(self) -> Verdict | Literal["skipped"]:
        """What the headers amount to."""
        if self.audit is None:
            return "skipped"
        return "rejected" if self.action == "reject" else self.audit.verdict

    @property
    def codes(self) -> tuple[str, ...]:
        """The reasons for the verdict, for programs."""
        if self.audit is None:
            return ()
        return (self.code,) if self.code else tuple(dict.fromkeys(self.audit.codes + codes(self.warnings)))

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """What is doubtful about the headers, the plan, and about which segmentations go to the series."""
        if self.audit is None:
            return ()
        planned = self.plan.warnings if self.plan is not None and self.plan.recipe.image else ()
        return self.audit.warnings + planned + tuple(w for g in self.segmentations if (w := g.warning) is not None)

    def needs(self, backend: Backend, engine: Engine) -> Needs:
        """Return what its conversion takes."""
        if self.plan is None:
            return Needs(0, 0, 0)
        image = self.plan.recipe.image
        memory = needed_bytes(self.plan, backend, engine) if image else 0
        if self.segmentations:  # after the image
            memory = max(memory, mask_bytes(self.plan, backend))
        if backend.name == "cpu":  # else it is the memory of the device
            memory += WRITING_BYTES.get(self.plan.recipe.format, 0)
        voxels = prod(self.plan.source.shape) + prod(self.plan.target.shape)
        return Needs(self.plan.output_bytes if image else 0, memory, voxels)


def outlooks(
    cohort: Cohort,
    chosen: Iterable[Series],
    paths: list[str],
    recipe: Recipe,
    matches: Matched | None,
    values: Mapping[str, int],
    output: Output | None,
    manifest: Manifest | None,
    *,
    names: Pseudonyms | None = None,
) -> Iterator[Outlook]:
    """Yield what would happen to some series of a cohort.

    Parameters
    ----------
    cohort : Cohort
        All series: the folder of one depends on the others.
    chosen : iterable of Series
        Those that matter.
    paths : list of str
        What the cohort was found under.
    recipe : Recipe
        How.
    matches : Matched, optional
        Which segmentation goes to which series; absent: no masks are asked for.
    values : mapping of str to int
        Label values of structures, where they share volumes.
    output, manifest : optional
        What earlier runs have made.
    names : Pseudonyms, optional
        What stands for names in `output`; folders then have to wait until it is known who the patients are.
    """
    taken = {folder: key for folder, key in manifest.columns("folder", "key") if folder} if manifest else {}
    folders = {} if names else layout(cohort, paths, taken)
    shared = recipe.masks.layout == "labels"
    recipe_sha256 = recipe.sha256
    for series in chosen:
        found = matches.by_key.get(series.key, ()) if matches is not None else ()
        if not found and not recipe.image:
            continue
        structures = tuple(used_names(found, recipe.masks, names.of if names else None))
        former = manifest.entry(series.key) if manifest else None
        own = tuple((name, values.get(name, 0)) for name in structures) if shared else ()
        now = fingerprint_in_out(series, found, own, names)
        outlook = partial(
            Outlook,
            series,
            fingerprint=now,
            label_values=own,
            former=former,
            segmentations=found,
            structures=structures,
        )
        if former and output and _complete((now, recipe_sha256, _version.__version__), output, former):
            yield outlook("skip", former.folder, None)
            continue
        audited = audit(series, recipe.rules)
        if audited.stack is None:
            yield outlook("reject", "", None, audited, audited.reason)
            continue
        try:
            plan = make_plan(audited.stack.geometry, recipe, audited.stack.placement)
        except PlanError as exc:
            yield outlook("reject", "", None, audited, f"PlanError: {exc}", "plan")
            continue
        if bad := [g for g in found if g.error]:
            reason = f"SegmentationError: {printable(basename(bad[0].path))}: {bad[0].error}"
            yield outlook("reject", "", None, audited, reason, bad[0].code)
        else:
            yield outlook("convert", folders.get(series.key, ""), plan, audited)


def fingerprint_in_out(
    series: Series, found: Sequence[Glimpse], values: Sequence[tuple[str, int]], names: Pseudonyms | None
) -> str:
    """Return the fingerprint of a series as it may be kept: whoever has the files must not know them again by it."""
    plain = fingerprint(series, found, values)
    return plain if names is None else names.of("input", plain)


def _complete(wanted: tuple[str, str, str], output: Output, former: Entry) -> bool:
    """Whether an earlier output stands for exactly this input, recipe and version, and is all there."""
    same = (former.fingerprint, former.recipe_sha256, former.version) == wanted
    return same and former.status in DONE and output.contents(former.folder) == (former.files, former.bytes)
