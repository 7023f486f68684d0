"""Converts the masks of one series: reads its segmentations, draws structures on its slices, resamples labels."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.compute.backend import Backend
from gpuprep.compute.resample_labels import LABEL_LIMIT, label_chunks, slice_volumes_ml
from gpuprep.core.formatting import first_few, format_count, printable
from gpuprep.core.mask_options import Masks, Pseudonymise
from gpuprep.core.plan import Plan
from gpuprep.dicom.stack import Stack
from gpuprep.errors import SegmentationError
from gpuprep.masks.frames_of_reference import structures_in_frame
from gpuprep.masks.joined_files import joined
from gpuprep.masks.model import Segmentation
from gpuprep.masks.place_on_slices import PlacedStructure, place, slice_plane
from gpuprep.masks.read import names_by_path, read_segmentation
from gpuprep.masks.structures_box import box_of
from gpuprep.output.paths import LONGEST_NAME, safe_file_name
from gpuprep.output.preview import MiddlePlanes
from gpuprep.output.writers import WRITERS
from gpuprep.output.writers.content import Content, OnFileFinished, ignore_finished_file
from gpuprep.output.writers.omezarr import LABELS_GROUP, list_labels

OVERLAPS_NAMED = 3
"""Pairs of overlapping structures that a message names."""
STRUCTURES_NAMED = 5
"""Structures without voxels that a message names."""

EMPTY = "mask-empty"
"""Code of the error if a segmentation has structures and none covers a voxel of the series."""


@dataclass(slots=True)
class Label:
    """One structure of the masks of a series."""

    name: str
    source: str
    """Segmentation file."""
    contours: int
    slices: int
    """Number of slices on which it is drawn."""
    value: int
    """Value of its voxels in the label volume; 1 in a volume of its own."""
    file: str
    """File or folder of that volume, relative to the folder of the series."""
    source_voxels: int = 0
    """Number of voxels on the slices as acquired."""
    source_ml: float = 0.0
    voxels: int = 0
    """Number of voxels on the grid of the output."""
    ml: float = 0.0


@dataclass(slots=True)
class Masked:
    """Masks of a series: structures, segmentation files, warnings."""

    labels: list[Label] = field(default_factory=list)
    segmentations: list[dict[str, Any]] = field(default_factory=list)
    """Path, format, and how the format was recognised."""
    notes: list[str] = field(default_factory=list)


def read_placed(
    paths: Sequence[str],
    stack: Stack,
    options: Masks,
    series_uid: str,
    frame_uid: str,
    hide: Pseudonymise | None = None,
) -> tuple[list[PlacedStructure], Masked]:
    """Read segmentations, and return the chosen structures on the slices of a series.

    Parameters
    ----------
    paths : sequence of str
        Segmentation files.
    stack : Stack
        The slices.
    options : Masks
        How text files are read, and which structures are chosen.
    series_uid, frame_uid : str
        *Series Instance UID* and *Frame of Reference UID* of the series.
    hide : callable, optional
        As for `Masks.names`.

    Raises
    ------
    SegmentationError
        If a file cannot be read, or its structures cannot be drawn on the slices; names the file.
    """
    masked = Masked()
    plane = slice_plane(stack)
    found: list[Segmentation] = []
    for path in paths:
        with _errors_named(path):
            found.append(read_segmentation(path, options, plane))
    placed: list[PlacedStructure] = []
    known: list[tuple[str, str]] = []
    for segmentation in joined(found):
        known += [(segmentation.path, structure.name) for structure in segmentation.structures]
        masked.segmentations.append(
            {"path": printable(segmentation.path), "format": segmentation.format, "why": segmentation.why}
        )
        with _errors_named(segmentation.path):
            own, left_out = structures_in_frame(segmentation, series_uid, frame_uid)
            structures, notes = place(own, stack, options)
        placed += structures
        masked.notes += [f"{printable(os.path.basename(segmentation.path))}: {note}" for note in (*left_out, *notes)]
        masked.notes += _foreign(own, series_uid, frame_uid)
    # Structures without contours are named too, as they were when label values were chosen.
    pairs = list(dict.fromkeys(known))
    names_in_paths = names_by_path((s.path, s.format) for s in found) if hide else ()
    names = dict(zip(pairs, options.names(pairs, hide, names_in_paths), strict=True))
    wanted = [p.renamed(name) for p in placed if (name := names[p.source, p.name]) is not None]
    _check_distinct(wanted)
    if not wanted:
        what = (
            f"none of the {len(placed)} structures drawn on it has a name that --roi matches"
            if placed
            else "nothing is drawn on it"
        )
        masked.notes.append(f"{what}: no masks are written")
    return wanted, masked


def _check_distinct(wanted: Sequence[PlacedStructure]) -> None:
    """Raise if two structures have the same name, and so the same label."""
    twice = [name for name, count in Counter(p.name for p in wanted).items() if count > 1]
    if twice:
        sources = sorted({printable(os.path.basename(p.source)) for p in wanted if p.name == twice[0]})
        raise SegmentationError(
            f"two structures are called {printable(twice[0])} (in {' and '.join(sources)}): choose one with --roi, or "
            "keep files of different formats in folders of their own"
        )


def write_masks(
    wanted: Sequence[PlacedStructure],
    masked: Masked,
    stack: Stack,
    plan: Plan,
    backend: Backend,
    values: Mapping[str, int],
    folder: Path,
    finish_file: OnFileFinished = ignore_finished_file,
) -> list[MiddlePlanes]:
    """Write the masks of a series, and add their structures to `masked`.

    Parameters
    ----------
    wanted, masked
        From `read_placed`.
    stack : Stack
        The slices of the series.
    plan : Plan
        Plan of the image.
    backend : Backend
        Resamples the labels.
    values : mapping of str to int
        Label value of each structure.
    folder : path
        Output folder of the series.
    finish_file : callable
        As for a writer.

    Returns
    -------
    list of Planes
        Middle planes of each label volume, for the preview.

    Raises
    ------
    SegmentationError
        If structures that share a volume overlap, or no structure covers a voxel.
    """
    recipe = plan.recipe
    write = WRITERS[recipe.format]
    image = folder / f"volume{recipe.ending}" if recipe.format == "zarr" and recipe.image else None
    if recipe.masks.layout == "labels":
        if new := [p for p in wanted if p.name not in values]:
            raise SegmentationError(
                f"{printable(new[0].source)} has changed since it was looked at: convert again", "changed"
            )
        volumes = [(f"labels{recipe.ending}", [(p, values[p.name]) for p in wanted])]
        if image:
            volumes = [(f"{image.name}/{LABELS_GROUP}/labels", volumes[0][1])]
    else:
        files = _files([p.name for p in wanted], "" if image else recipe.ending)
        parent = f"{image.name}/{LABELS_GROUP}" if image else "masks"
        volumes = [(f"{parent}/{file}", [(p, 1)]) for p, file in zip(wanted, files, strict=True)]
        if not image:
            (folder / parent).mkdir()
    voxel_ml = abs(float(np.linalg.det(plan.target.affine))) / 1000
    shown = []
    for name, members in volumes:
        labels = [Label(p.name, p.source, p.contours, len(p.parts), value, name) for p, value in members]
        painted = _painted(members, labels, stack, plan)
        counts = np.zeros(max((label.value for label in labels), default=0) + 1, dtype=np.int64)
        content = Content.labels(plan, str(painted.dtype), len(counts) - 1)
        with backend.session() as lane:
            chunks = label_chunks(painted, plan, stack.placement, recipe.masks.resampling, backend)
            planes = MiddlePlanes(plan.target.shape)
            written = planes.collecting(_counted(lane.downloads(chunks), counts))
            masked.notes += write(folder / name, written, content, finish_file)
            shown.append(planes)
        for label, (structure, _) in zip(labels, members, strict=True):
            label.voxels = int(counts[label.value])
            label.ml = label.voxels * voxel_ml
            if plan.crop and not plan.crop.contains(box_of([structure], stack)):
                masked.notes.append(
                    f"{printable(label.name)}: it reaches beyond the box to which the series is cropped"
                )
            if not label.voxels:
                lost = (
                    f"of its {format_count(label.source_voxels, 'voxel')} none is left"
                    if label.source_voxels
                    else "it covers no voxel"
                )
                masked.notes.append(f"{printable(label.name)}: {lost}")
        masked.labels += labels
    _check_not_empty(masked.labels)
    if image:
        list_labels(image, [name.rpartition("/")[2] for name, _ in volumes])
    return shown


def _check_not_empty(labels: Sequence[Label]) -> None:
    """Raise if no structure of a file, or of the series, covers a voxel: its mask would be all background."""
    by_source: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_source[label.source].append(label)
    for source, own in by_source.items():
        if not any(label.source_voxels for label in own):
            raise SegmentationError(
                f"{printable(os.path.basename(source))}: {_enumerated(own)} of it covers a voxel of the series: is it "
                "drawn on another series? Take it away to convert the image alone",
                EMPTY,
            )
    if labels and not any(label.voxels for label in labels):
        raise SegmentationError(
            f"{_enumerated(labels)} has a voxel left on the grid of the output, of "
            f"{format_count(sum(label.source_voxels for label in labels), 'voxel')} as acquired: choose a finer "
            "spacing, or another crop",
            EMPTY,
        )


def _enumerated(labels: Sequence[Label]) -> str:
    """Return "none of N structures", with the first few names."""
    names = first_few([printable(label.name) for label in labels], STRUCTURES_NAMED)
    return f"none of {format_count(len(labels), 'structure')} ({names})"


def _files(names: Sequence[str], ending: str) -> list[str]:
    """Return a file name for each structure; they differ even where a file system ignores case."""
    used = {"zarr.json"}  # stands beside label volumes in OME-Zarr
    files = []
    for name in names:
        file = safe_file_name(printable(name), LONGEST_NAME - len(ending) - 4)
        n = 2
        while (unique := file if n == 2 and file.casefold() not in used else f"{file}~{n}").casefold() in used:
            n += 1
        used.add(unique.casefold())
        files.append(unique + ending)
    return files


def _painted(
    members: Sequence[tuple[PlacedStructure, int]], labels: Sequence[Label], stack: Stack, plan: Plan
) -> NDArray[Any]:
    """Return the labels on the slices as acquired, (k, j, i) of uint8 or uint16, and count voxels in `labels`."""
    matrix = stack.matrix
    highest = max((value for _, value in members), default=0)
    if highest >= LABEL_LIMIT:
        raise SegmentationError(
            f"there are more than {LABEL_LIMIT - 1} names of structures in OUT/labels.json: choose some with --roi, "
            "give several one name with aliases, or use --mask-layout per-roi"
        )
    dtype = np.uint8 if highest < 256 else np.uint16
    painted = np.zeros((len(stack.slices), *matrix), dtype=dtype)
    volume_ml = slice_volumes_ml(plan, stack.placement)
    overlaps: Counter[tuple[str, str]] = Counter()
    names = {value: p.name for p, value in members}
    for (structure, value), label in zip(members, labels, strict=True):
        for n in structure.parts:
            within, mask = structure.paint(n, matrix)
            there = painted[n][within]
            voxels = int(np.count_nonzero(mask))
            label.source_voxels += voxels
            label.source_ml += voxels * float(volume_ml[n])
            taken = there[mask]
            if taken.any():
                for other, count in zip(*np.unique(taken[taken != 0], return_counts=True), strict=True):
                    overlaps[names[int(other)], structure.name] += int(count)
            there[mask] = value
    if overlaps:
        pairs = [
            f"{printable(a)} and {printable(b)} ({format_count(n, 'voxel')})" for (a, b), n in overlaps.most_common()
        ]
        found = first_few(pairs, OVERLAPS_NAMED, "pairs")
        raise SegmentationError(
            f"structures overlap, which one label volume cannot hold: {found}; choose some with --roi, or use "
            "--mask-layout per-roi",
            "mask-overlap",
        )
    return painted


def _counted(chunks: Iterator[NDArray[Any]], counts: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Yield chunks unchanged, and add the number of voxels of each value to `counts`."""
    for chunk in chunks:
        counts += np.bincount(chunk.reshape(-1), minlength=len(counts))
        yield chunk


def _foreign(segmentation: Segmentation, series_uid: str, frame_uid: str) -> list[str]:
    """Return warnings if a segmentation names another series or frame of reference."""
    name = printable(os.path.basename(segmentation.path))
    notes = []
    if segmentation.series_uids and series_uid not in segmentation.series_uids:
        notes.append(f"{name} refers to series {printable(segmentation.series_uids[0])}, not to this one")
    if segmentation.frame_of_reference_uid and frame_uid and segmentation.frame_of_reference_uid != frame_uid:
        notes.append(f"{name} has another frame of reference than the series")
    return notes


@contextmanager
def _errors_named(path: str) -> Iterator[None]:
    """Prefix the text of errors with the name of a file."""
    try:
        yield
    except SegmentationError as exc:
        raise SegmentationError(f"{printable(os.path.basename(path))}: {exc}", exc.code) from exc
