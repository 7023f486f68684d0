"""Writes label volumes as DICOM Segmentation (SEG) on the slices of the original images, by highdicom."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuprep import _version
from gpuprep.core.coded_concepts import LONGEST_MEANING, long_string
from gpuprep.core.formatting import first_few, format_count, printable
from gpuprep.core.series import SliceHeader
from gpuprep.errors import InputError, OutputError, RequestError
from gpuprep.files.replacing import replacing_path
from gpuprep.masks.structure_codes import PRIVATE_SCHEME, Coded
from gpuprep.output.preview import COLOURS
from gpuprep.output.seg_sources import Sources, read_sources

if TYPE_CHECKING:
    from highdicom.seg import Segmentation, SegmentDescription

Kind = Literal["binary", "labelmap"]

LARGEST_LABEL = 65535
"""Largest segment number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegOptions:
    """What the pixels do not tell of a segmentation."""

    kind: Kind = "binary"
    """"binary": a frame of bits per structure and slice, which more viewers read. "labelmap": one frame per slice, with
    the labels as values (Label Map Segmentation, of 2024)."""
    algorithm: str = "unknown"
    """Name of the model that predicted the labels."""
    algorithm_version: str = "unknown"
    series_description: str = "Segmentation"
    series_number: int = 9000
    made: datetime | None = None
    """When the labels were predicted; now if absent. Files of equal input and time are equal."""

    def __post_init__(self) -> None:
        if self.kind not in ("binary", "labelmap"):
            raise RequestError(f"kind = {self.kind!r}: choose one of binary, labelmap")
        for name in ("algorithm", "algorithm_version", "series_description"):
            value = getattr(self, name)
            if not value.strip() or len(value) > LONGEST_MEANING or "\\" in value or not value.isprintable():
                raise RequestError(f"{name} = {value!r}: give up to {LONGEST_MEANING} characters without backslash")
        if not 1 <= self.series_number < 2**31:
            raise RequestError(f"series_number = {self.series_number}: give a number from 1 to {2**31 - 1}")


def imported_highdicom() -> Any:
    """Return the package highdicom; raise RequestError if it is not installed."""
    try:
        import highdicom
    except ImportError as exc:
        raise RequestError(
            f"a DICOM SEG needs {exc.name}, which cannot be imported: pip install 'gpuprep[seg]'"
        ) from exc
    return highdicom


def write_seg(
    values: NDArray[Any],
    names: Mapping[int, str],
    headers: Sequence[SliceHeader],
    codes: Mapping[str, Coded],
    to: Path,
    options: SegOptions | None = None,
) -> tuple[str, ...]:
    """Write labels on the slices of a series as DICOM SEG.

    Each frame has position, orientation and pixel spacing of the original slice, and refers to it. Frames without a
    voxel are omitted.

    Parameters
    ----------
    values : array of uint8 or uint16, shape (slices, rows, columns)
        Label of each pixel of the original slices; 0 is background.
    names : mapping of int to str
        Structure of each label.
    headers : sequence of SliceHeader
        The slices in spatial order: `gpuprep.dicom.stack.Stack.slices`. Their files are opened again.
    codes : mapping of str to Coded
        Codes of each structure: see `gpuprep.masks.structure_codes.coded`.
    to : Path
        The file. A former one is replaced at the end.
    options : SegOptions, optional
        `SegOptions()` by default.

    Returns
    -------
    tuple of str
        Notes for the user: structures that have no voxel, attributes of the images that had to be changed.

    Raises
    ------
    RequestError
        If highdicom is not installed, the labels do not fit the slices, or a label has no name.
    InputError
        If an original cannot be read, has changed, or lacks what a segmentation has to repeat.
    OutputError
        If the file cannot be written.

    References
    ----------
    DICOM PS3.3, A.51 (Segmentation), A.90 (Label Map Segmentation), C.8.20 (modules).
    """
    options = options or SegOptions()
    names = {label: name for label, name in names.items() if name.strip()}  # a segment has to have a name
    present = _check_labels(values, names, headers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydicom and highdicom, about values of the original images
        sources = read_sources(headers, values.shape[1:])
        notes = list(sources.notes)
        labels = sorted(label for label in names if label)
        absent = [label for label in labels if label not in present]
        if absent and present:
            # OHIF 3.8 does not open a file that describes a segment and has no frame of it (OHIF/Viewers#3991).
            labels = [label for label in labels if label in present]
            few = first_few([printable(names[label]) for label in absent])
            notes.append(f"{format_count(len(absent), 'structure')} without a voxel left out: {few}")
        elif not present:
            notes.append("no structure has a voxel: each has one empty frame")
        _save(_segmentation(values, labels, names, codes, sources, options), to)
    return tuple(notes)


def _check_labels(values: NDArray[Any], names: Mapping[int, str], headers: Sequence[SliceHeader]) -> set[int]:
    """Return the labels that have a voxel, without 0; raise if the array or a label cannot be written."""
    if values.ndim != 3 or values.dtype.kind != "u" or values.dtype.itemsize > 2:
        raise RequestError(f"labels are {values.dtype} of shape {values.shape}: give uint8 or uint16, slices first")
    if len(values) != len(headers):
        raise RequestError(f"there are labels of {len(values)} slices, and {len(headers)} original slices")
    if wrong := [label for label in names if not 0 <= label <= LARGEST_LABEL]:
        raise RequestError(f"label {wrong[0]} ({printable(names[wrong[0]])}) is beyond {LARGEST_LABEL}")
    if not any(names):
        raise RequestError("no label has a name, so there is no structure to write: name them (--labels FILE)")
    counts = np.zeros(2 ** (8 * values.dtype.itemsize), dtype=np.int64)
    for plane in values:
        counts += np.bincount(plane.ravel(), minlength=len(counts))
    present = {int(label) for label in np.flatnonzero(counts) if label}
    if unnamed := sorted(present - names.keys()):
        raise RequestError(
            f"{format_count(int(counts[unnamed].sum()), 'voxel')} have labels without a name: "
            f"{first_few([str(label) for label in unnamed])}; name them too (--labels FILE)"
        )
    return present


def _segmentation(
    values: NDArray[Any],
    labels: Sequence[int],
    names: Mapping[int, str],
    codes: Mapping[str, Coded],
    sources: Sources,
    options: SegOptions,
) -> Segmentation:
    """Return the data set."""
    highdicom = imported_highdicom()
    numbers = labels if options.kind == "labelmap" else range(1, len(labels) + 1)
    described = [
        _described(number, label, names[label], codes[names[label]], options)
        for number, label in zip(numbers, labels, strict=True)
    ]
    if options.kind == "binary":
        table = np.zeros(2 ** (8 * values.dtype.itemsize), values.dtype)
        table[labels] = numbers
        values = table[values]
    images = sources.images
    further = None
    if not values.any():  # highdicom would write an empty frame of each structure on each slice
        values, images, further = values[:1], sources.images[:1], sources.images[1:]
    made = options.made or datetime.now()
    versions = _version.__version__, highdicom.__version__
    uid = sources.uids(values, [str(d) for d in described], replace(options, made=made), versions)
    scheme = highdicom.coding_schemes.CodingSchemeIdentificationItem(PRIVATE_SCHEME, name="Names of structures")
    private = any(codes[names[label]].type.scheme_designator == PRIVATE_SCHEME for label in labels)
    seg: Segmentation = highdicom.seg.Segmentation(
        images,
        values,
        options.kind.upper(),
        described,
        series_instance_uid=uid("series"),
        series_number=options.series_number,
        sop_instance_uid=uid("instance"),
        instance_number=1,
        manufacturer="gpuprep",
        manufacturer_model_name="gpuprep",
        software_versions=_version.__version__,
        device_serial_number="none",
        content_label="SEGMENTATION",
        content_description=options.series_description,
        series_description=options.series_description,
        content_date=made.date(),
        content_time=made.time(),
        series_date=made.date(),
        series_time=made.time(),
        coding_schemes=[scheme] if private else None,
        omit_empty_frames=bool(values.any()),
        further_source_images=further,
    )
    seg.ContentCreatorName = None  # has to be there, if empty
    del seg.InstanceCreationDate, seg.InstanceCreationTime  # would differ between equal files
    for equipment in seg.get("ContributingEquipmentSequence", ()):
        equipment.ContributionDateTime = f"{made:%Y%m%d%H%M%S}"
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid("dimensions")
    sources.refer(seg)
    if (database := getattr(seg, "_db_con", None)) is not None:
        database.close()  # highdicom leaves open the index of frames by which it would read them
    return seg


def _described(number: int, label: int, name: str, coded: Coded, options: SegOptions) -> SegmentDescription:
    """Return the description of a segment."""
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        options.algorithm, codes.cid7162.ArtificialIntelligence, options.algorithm_version
    )
    # Without colours OHIF does not open the file (OHIF/Viewers#3939), and dcmqi gives all segments the same one.
    colour = COLOURS[(label - 1) % len(COLOURS)]  # as in previews
    segment = highdicom.seg.SegmentDescription(
        number, long_string(name), coded.category, coded.type, "AUTOMATIC", algorithm,
        display_color=highdicom.color.CIELabColor.from_rgb(*colour),
    )  # fmt: skip
    if coded.side is not None:
        side = highdicom.sr.CodedConcept.from_code(coded.side)
        segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
    return segment


def _save(seg: Segmentation, to: Path) -> None:
    """Write a file, which appears when it is complete."""
    try:
        with replacing_path(to) as part:
            seg.save_as(part, enforce_file_format=True)
    except OSError as exc:
        cause = _first_cause(exc)
        raise OutputError(f"{to} cannot be written: {getattr(cause, 'strerror', None) or cause}") from exc
    except (ValueError, TypeError, UnicodeError) as exc:
        reason = " ".join(str(_first_cause(exc)).split())
        raise InputError(f"{to} cannot be written ({reason}): an original has a malformed value") from exc


def _first_cause(exc: BaseException) -> BaseException:
    """Return the exception from which another was raised; pydicom adds a traceback to the text of the latter."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return exc
