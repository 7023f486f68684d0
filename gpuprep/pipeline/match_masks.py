"""Matches segmentations to series, by the UIDs that they name, else by their paths."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from gpuprep.core.formatting import first_few, printable
from gpuprep.core.mask_options import Masks, Pseudonymise
from gpuprep.core.series import Series, image_digest, sop_digest
from gpuprep.dicom.discover import Cohort, OtherSeries
from gpuprep.errors import SegmentationError
from gpuprep.executors.processes import Executor, WorkerDiedError, run_batches
from gpuprep.files.filesystem import absolute, isdir
from gpuprep.masks.detect_format import UNKNOWN_FORMAT
from gpuprep.masks.filename_hints import UID
from gpuprep.masks.joined_files import group_paths
from gpuprep.masks.model import ImageFrame, Plane
from gpuprep.masks.read import DAMAGED_OBJECT, names_by_path
from gpuprep.pipeline.segmentation_files import (
    NOT_ONE,
    SegmentationSummary,
    SummaryRequest,
    below,
    files_under,
    summaries,
)

log = logging.getLogger(__name__)

NONE = (NOT_ONE, UNKNOWN_FORMAT)
"""Codes of errors for files that belong to no series."""

SEGMENTATIONS_PER_TASK = 16

HOW = "say which with gpuprep mask FILE --series DICOM_DIR"


@dataclass(frozen=True, slots=True)
class Matched:
    """Segmentations of each series, and those that belong to none."""

    by_key: Mapping[str, tuple[SegmentationSummary, ...]]
    """Segmentations of a series, by its key."""
    unmatched: tuple[tuple[SegmentationSummary, str], ...]
    """Segmentations that belong to no series, each with the reason."""
    named: frozenset[str]
    """Files that the user named, and segmentations in folders that the user named: each without a series is an
    error."""
    auto: bool = False
    """Whether the segmentations were found among the inputs, and not named by the user."""

    @property
    def complaints(self) -> tuple[tuple[str, str], ...]:
        """(path, reason) of segmentations without a series that the user named."""
        return tuple((printable(g.path), why) for g, why in self.unmatched if g.path in self.named)

    @property
    def unused(self) -> tuple[tuple[str, str], ...]:
        """(path, reason) of segmentations without a series among the inputs: reported, but no failure."""
        return tuple((printable(g.path), why) for g, why in self.unmatched) if self.auto else ()

    @property
    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Rows of the manifest: path, format, how it was recognised, key of the series, reason why it has none."""
        for key, found in self.by_key.items():
            yield from ((printable(g.path), g.format, g.why, key, g.error) for g in found)
        for g, why in self.unmatched:
            yield printable(g.path), g.format, g.why, "", why


def matched(
    cohort: Cohort,
    inputs: Sequence[str],
    roots: Sequence[str] | None,
    mask_options: Masks,
    executor: Executor,
    *,
    exclude: str | os.PathLike[str] | None,
    alone: bool,
) -> Matched:
    """Find segmentations, read each once, and return those of each series.

    Parameters
    ----------
    cohort : Cohort
        All series.
    inputs : sequence of str
        Paths under which the series were found.
    roots : sequence of str or None
        Segmentation files, or folders of them; None: DICOM objects and LIDC XML among the inputs.
    mask_options : Masks
        How text files are read.
    executor : Executor
        Runs the reading.
    exclude : path or None
        The output folder, which is not searched.
    alone : bool
        As for `match`; applies to files that the user named.
    """
    files = list(cohort.segmentations) if roots is None else files_under(roots, exclude)
    found = _read_summaries([SummaryRequest(f, mask_options) for f in files], executor)
    by_key, unmatched = match(
        found, cohort, inputs if roots is None else roots, inputs, cohort.others, alone=alone and roots is not None
    )
    # Some text files can be read only when the pixel spacing of their series is known; DICOM objects never need it.
    requests = {
        g.path: SummaryRequest(g.path, mask_options, Plane(s.rows, s.columns, s.pixel_spacing_mm))
        for s in cohort
        if s.pixel_spacing_mm is not None
        for g in by_key.get(s.key, ())
        if g.error and g.code != DAMAGED_OBJECT
    }
    again = {g.path: g for g in _read_summaries(list(requests.values()), executor)}
    by_key = {key: tuple(_without_images(again.get(g.path, g), g.volumes) for g in gs) for key, gs in by_key.items()}
    if roots is None:
        return Matched(by_key, unmatched, frozenset(), auto=True)
    explicit = {absolute(root) for root in roots if not isdir(root)}
    other = {g.path for g, _ in unmatched if g.code == NOT_ONE or (g.code == UNKNOWN_FORMAT and _is_document(g.path))}
    other -= explicit
    useful = [g.path for g in found if g.path not in other]
    barren = [r for r in map(absolute, roots) if isdir(r) and not any(below(f, r) for f in useful)]
    nothing = tuple((SegmentationSummary(folder), "it holds no segmentation") for folder in dict.fromkeys(barren))
    return Matched(by_key, unmatched + nothing, (frozenset(files) - other).union(barren))


def _without_images(summary: SegmentationSummary, volumes: int) -> SegmentationSummary:
    """Return a summary without the images that it refers to: they are many, and only matching needs them."""
    return replace(summary, volumes=volumes, sop_uids=frozenset(), drawn_on=frozenset())


def _is_document(path: str) -> bool:
    """Whether a file is a document by its name, such as a README, and no segmentation."""
    name = os.path.basename(path).lower()
    return name.endswith((".md", ".rst", ".html", ".log")) or name.startswith(("readme", "license", "licence"))


def _read_summaries(requests: list[SummaryRequest], executor: Executor) -> list[SegmentationSummary]:
    """Return the summaries of segmentations, in the order of the requests."""

    def dead(request: SummaryRequest, exc: WorkerDiedError) -> SegmentationSummary:
        return SegmentationSummary(request.path, error=str(exc), code="mask")

    n = SEGMENTATIONS_PER_TASK
    tasks = [requests[i : i + n] for i in range(0, len(requests), n)]
    told = {g.path: g for _, found in run_batches(executor, summaries, tasks, dead) for g in found}
    return [told[q.path] for q in requests]


def match(
    found: Sequence[SegmentationSummary],
    cohort: Sequence[Series],
    roots: Sequence[str],
    inputs: Sequence[str],
    others: Mapping[str, OtherSeries],
    *,
    alone: bool,
) -> tuple[dict[str, tuple[SegmentationSummary, ...]], tuple[tuple[SegmentationSummary, str], ...]]:
    """Return the segmentations of each series, by its key, and those that belong to none, with the reason.

    A segmentation belongs to each volume that holds images it is drawn on; else to each that holds images it lists;
    else to the series whose UID it names. If several volumes have that UID, those in its frame of reference and its
    study are taken. A segmentation that names a series of another modality belongs to no series. One that names only
    series and images that are not among the inputs belongs to the only series in its frame of reference.

    A segmentation that names no UID belongs to the series its path points to: by a UID in the path; by lying in or
    above the folder of one series only; or by the same relative path, in a tree of masks beside the tree of images. If
    there is one series only, and no path points to a series, it gets the files that the user named, and those directly
    in a folder that the user named.

    Parameters
    ----------
    found : sequence of SegmentationSummary
        The segmentations.
    cohort : sequence of Series
        All series.
    roots, inputs : sequence of str
        Paths under which segmentations and series were found.
    others : mapping of str to OtherSeries
        Series of other modalities among the inputs, by *Series Instance UID*.
    alone : bool
        Whether files that the user named belong to the only series, whatever UIDs they name.
    """
    used = {path for g in found for path, *_ in g.beside}
    found = [g for g in found if g.code not in NONE or g.path not in used]
    named = {absolute(r) for r in roots if not isdir(r)} if alone else set()
    known = _Known(found, cohort, roots, inputs, others)
    by_key: dict[str, list[SegmentationSummary]] = defaultdict(list)
    unmatched: list[tuple[SegmentationSummary, str]] = []
    lost: list[tuple[SegmentationSummary, str]] = []
    for g in found:
        if g.code in NONE:
            unmatched.append((g, g.error))
        elif len(cohort) == 1 and g.path in named:
            by_key[cohort[0].key].append(g)
        else:
            by_path = not (g.series_uids or g.sop_uids or g.frame_of_reference_uid)
            answer = known.by_path(g) if by_path else known.by_uid(g)
            for s in answer.series:
                volumes = 1 if answer.precise else sum(s.series_uid == other.series_uid for other in answer.series)
                by_key[s.key].append(replace(g, volumes=volumes))
            if not answer.series:
                (lost if by_path else unmatched).append((g, g.error or answer.reason))
    for g, reason in lost:
        if len(cohort) == 1 and not known.pointed and g.code != DAMAGED_OBJECT and known.is_near(g):
            by_key[cohort[0].key].append(g)
        else:
            unmatched.append((g, reason))
    order = {g.path: n for n, g in enumerate(found)}
    by_key = {key: sorted(gs, key=lambda g: order[g.path]) for key, gs in by_key.items()}
    return {key: tuple(gs) for key, gs in by_key.items()}, tuple(unmatched)


class _Answer(NamedTuple):
    """Series that a segmentation belongs to."""

    series: list[Series]
    reason: str = ""
    """Why there are none."""
    precise: bool = True
    """Whether its images, frame of reference or study distinguish these volumes of one Series Instance UID."""


class _Known:
    """The series of a cohort, by the UIDs and paths that a segmentation may name."""

    def __init__(
        self,
        found: Sequence[SegmentationSummary],
        cohort: Sequence[Series],
        roots: Sequence[str],
        inputs: Sequence[str],
        others: Mapping[str, OtherSeries],
    ) -> None:
        self._cohort = cohort
        self._others = others
        self._roots = [absolute(r) if isdir(r) else os.path.dirname(absolute(r)) for r in roots]
        self._by_series: dict[str, list[Series]] = defaultdict(list)
        self._by_frame: dict[str, list[Series]] = defaultdict(list)
        self._sop_uids = {uid for g in found for uid in (*g.sop_uids, *UID.findall(g.path))}
        """SOP Instance UIDs that any segmentation names."""
        self._by_sop: dict[str, tuple[Series, ...]] = {}
        self._by_image_frame: dict[ImageFrame, tuple[Series, ...]] = {}
        """Series by frame of a multi-frame image, whose frames may belong to several volumes."""
        for s in cohort:
            self._by_series[s.series_uid].append(s)
            self._by_frame[s.frame_of_reference_uid].append(s)
            alone = (s,)
            for header in s.slices:
                if (uid := header.sop_instance_uid) not in self._sop_uids:
                    continue
                if (there := self._by_sop.setdefault(uid, alone))[-1] is not s:
                    self._by_sop[uid] = (*there, s)
                if header.frames > 1:
                    image = ImageFrame(uid, header.frame + 1)
                    self._by_image_frame[image] = (*self._by_image_frame.get(image, ()), s)
        self._left_out = {
            digest: f"{name} ({why})"
            for s in cohort
            for digest, (name, why) in zip(s.left_out_digests, s.left_out, strict=True)
        }
        """Images that were left out of their series, each with its reason, by `image_digest`."""
        self.pointed = False
        """Whether the path of any file pointed to a series."""
        # The folder of masks may have the name of the folder of images.
        tops = [top for i in inputs if isdir(i) for top in (absolute(i), os.path.dirname(absolute(i)))]
        self._relative_paths = [
            (s, {os.path.relpath(s.folder, top) for top in tops if below(s.folder, top)}) for s in cohort
        ]

    def by_uid(self, g: SegmentationSummary) -> _Answer:
        for images in (g.drawn_on, {ImageFrame(uid) for uid in g.sop_uids}):
            if series := self._holding(images, g):
                return _Answer(series)
            if absent := sorted(filter(None, map(self._absent, images))):
                return _Answer([], f"it is drawn on images that were left out of their series: {first_few(absent)}")
        named = [parts for uid in dict.fromkeys(g.series_uids) if uid and (parts := self._by_series.get(uid))]
        if named:
            return _of_series(named, g)
        if other := self._other(g):
            modality = self._others[other].modality
            what = "of no known modality" if modality in ("", "another") else f"of modality {modality}"
            return _Answer([], f"it refers to series {printable(other)} {what}, which is not converted")
        if not (frame := g.frame_of_reference_uid):
            return _Answer([], f"it refers to series {printable((*g.series_uids, 'unknown')[0])}, which is not here")
        series = self._by_frame.get(frame, [])
        if len(series) == 1:
            return _Answer(series)
        if not series:
            return _Answer([], "it refers to a series and a frame of reference that are not here")
        return _Answer([], f"{len(series)} series share its frame of reference, and it refers to none of them: {HOW}")

    def by_path(self, g: SegmentationSummary) -> _Answer:
        for candidates in self._pointed(g.path):
            if len(candidates) == 1:
                self.pointed = True
                return _Answer(candidates)
            if candidates:
                return _Answer([], f"it names no series, and may belong to {len(candidates)} by its path: {HOW}")
        return _Answer([], f"it names no series, nor does its path: {HOW}")

    def _holding(self, images: Iterable[ImageFrame], g: SegmentationSummary) -> list[Series]:
        """Return the volumes that hold any of some images; of copies of an image, the volume that `g` refers to."""
        holding: dict[int, Series] = {}
        for image in images:
            holders = self._by_image_frame.get(image, ())
            if not holders and not self._absent(image):
                holders = self._by_sop.get(image.sop_uid, ())
            holding.update((id(s), s) for s in _likeliest(holders, g))
        return list(holding.values())

    def _absent(self, image: ImageFrame) -> str:
        """Return the name of an image or frame that was left out of its series, and why; "" for others."""
        if not self._left_out:
            return ""
        numbers = {0, image.number} if image.sop_uid not in self._by_sop else {image.number}
        return next((why for n in numbers if (why := self._left_out.get(image_digest(image.sop_uid, n)))), "")

    def _other(self, g: SegmentationSummary) -> str:
        """Return the UID of the series of another modality that a file refers to; "" for none."""
        named = [uid for uid in g.series_uids if uid in self._others]
        images = {image.sop_uid for image in g.drawn_on} or g.sop_uids
        return min(named or [self._other_by_sop[uid] for uid in images if uid in self._other_by_sop], default="")

    @cached_property
    def _other_by_sop(self) -> dict[str, str]:
        digests = {sop_digest(uid): uid for uid in self._sop_uids if uid not in self._by_sop}
        return {
            digests[digest]: series_uid
            for series_uid, other in self._others.items()
            for digest in other.sop_digests
            if digest in digests
        }

    def is_near(self, g: SegmentationSummary) -> bool:
        """Whether the user named a file or the folder it lies directly in, and its path has no UID."""
        return os.path.dirname(g.path) in self._roots and not UID.search(g.path)

    def _pointed(self, path: str) -> Iterator[list[Series]]:
        """Yield the series that a path may point to, the most certain first."""
        uids = set(UID.findall(path))
        yield list(
            {s.key: s for uid in uids for s in (*self._by_series.get(uid, []), *self._by_sop.get(uid, ()))}.values()
        )
        folder = os.path.dirname(path)
        yield [s for s in self._cohort if s.folder == folder]
        yield [s for s in self._cohort if below(folder, s.folder)]
        for root in self._roots:
            if not below(path, root):
                continue
            place = os.path.relpath(folder, root)
            whole = os.path.splitext(os.path.relpath(path, root))[0]
            yield [s for s, relative in self._relative_paths if {place, whole} & (relative - {"."})]
            yield [s for s, relative in self._relative_paths if place != "." and any(below(p, place) for p in relative)]
            yield [s for s, relative in self._relative_paths if any(p != "." and below(place, p) for p in relative)]
        yield [s for s in self._cohort if below(s.folder, folder)]


def _likeliest(series: Sequence[Series], g: SegmentationSummary) -> Sequence[Series]:
    """Return the volumes that are in the series, the frame of reference and the study that a file names."""
    if len(series) < 2:
        return series
    series = [s for s in series if s.series_uid in g.series_uids] or series
    series = [s for s in series if s.frame_of_reference_uid == g.frame_of_reference_uid] or series
    return [s for s in series if s.study_uid in g.study_uids] or series


def _of_series(named: list[list[Series]], g: SegmentationSummary) -> _Answer:
    """Return the volumes of series that a file names, without naming their images."""
    series: list[Series] = []
    precise, reason = True, ""
    for volumes in named:
        likeliest = _likeliest(volumes, g)
        studies = {(s.study_uid, s.frame_of_reference_uid) for s in likeliest}
        if len(studies) > 1:  # perhaps of two patients
            uid = printable(volumes[0].series_uid)
            reason = (
                f"it refers to series {uid}, which is {len(likeliest)} volumes in different studies or frames of "
                f"reference here, and to none of their images: {HOW}"
            )
            continue
        series += likeliest
        precise &= len(likeliest) == 1
    return _Answer(series, reason, precise)


def used_names(
    found: Sequence[SegmentationSummary], mask_options: Masks, hide: Pseudonymise | None = None
) -> list[str]:
    """Return the names under which the structures of one series are converted; `hide` as for `Masks.names`."""
    pairs = [(path, name) for path, g in zip(group_paths(found), found, strict=True) for name in g.names]
    try:
        names_in_paths = names_by_path((g.path, g.format) for g in found) if hide else ()
        return [
            name for name in mask_options.names(list(dict.fromkeys(pairs)), hide, names_in_paths) if name is not None
        ]
    except SegmentationError:  # the conversion of the series reports it
        return []


def fingerprint(series: Series, found: Sequence[SegmentationSummary], values: Sequence[tuple[str, int]]) -> str:
    """Return a hash of a series with its segmentations and label values; it is equal as long as they are unchanged."""
    if not found:
        return series.fingerprint
    lines = sorted(" ".join(map(str, (g.path, g.bytes, g.mtime_ns, *g.beside))) for g in found)
    return hashlib.sha256(repr((series.fingerprint, lines, sorted(values))).encode()).hexdigest()
