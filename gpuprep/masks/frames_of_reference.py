"""Selects the structures of a segmentation that lie in the frame of reference of a series.

The points of a region of interest (ROI) are coordinates in the frame of reference that the ROI names. A structure set
may hold ROIs in several frames, each frame with its own series. Anonymisers and careless programs often break the UIDs
of frames. So if all ROIs are in one frame, they are accepted for the series that the structure set refers to, even if
the series has another frame.

References
----------
DICOM PS3.3, C.8.8.5 (Structure Set module: *Referenced Frame of Reference UID* of an ROI), C.7.4.1 (frames).
"""

from __future__ import annotations

from dataclasses import replace

from gpuprep.core.formatting import format_count, printable
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import Segmentation, Structure

AMBIGUOUS_FRAME = "mask-frame"
"""Error code: no ROI is in the frame of reference of the series, and several other frames might be meant."""


def structures_in_frame(segmentation: Segmentation, series_uid: str, frame_uid: str) -> tuple[Segmentation, list[str]]:
    """Return a segmentation without the structures that lie in the frame of reference of another series.

    Structures without a frame of reference are kept. The frame of the series is, in this order: its own, if a structure
    is in it; the one under which the structure set lists the series; the only one in which something is drawn. In the
    last case, if the series is listed under another frame, the frames under which other series are listed do not count.

    Parameters
    ----------
    segmentation : Segmentation
        Segmentation as read. The result has the chosen frame as its `frame_of_reference_uid`.
    series_uid, frame_uid : str
        *Series Instance UID* and *Frame of Reference UID* of the series.

    Returns
    -------
    segmentation : Segmentation
    notes : list of str
        One note for each structure with contours or pixels that was left out.

    Raises
    ------
    SegmentationError
        If several frames of reference might be that of the series.
    """
    frames = {s.frame_of_reference_uid for s in segmentation.structures} - {""}
    matching = {frame_uid} & frames
    if not matching:
        listed = segmentation.series_by_frame
        matching = {frame for frame in frames if series_uid in listed.get(frame, ())}
        if not matching:
            is_listed = any(series_uid in series for series in listed.values())
            matching = {frame for frame in frames if not (is_listed and listed.get(frame))}
            drawn = {s.frame_of_reference_uid for s in segmentation.structures if _is_drawn(s)} & matching
            if len(drawn) > 1:
                raise SegmentationError(
                    f"its ROIs have {format_count(len(frames), 'frame')} of reference, none of which is that of the "
                    "series: it is not clear which ROIs are drawn on it; correct their Referenced Frame of Reference "
                    "UID, or leave the file out",
                    AMBIGUOUS_FRAME,
                )
    kept = tuple(s for s in segmentation.structures if s.frame_of_reference_uid in matching | {""})
    notes = [
        f"{printable(s.name)}: left out, it is drawn in another frame of reference than that of the series"
        for s in segmentation.structures
        if _is_drawn(s) and s.frame_of_reference_uid not in matching | {""}
    ]
    chosen = segmentation.frame_of_reference_uid
    if matching and chosen not in matching:
        chosen = min(matching)
    return replace(segmentation, structures=kept, frame_of_reference_uid=chosen), notes


def _is_drawn(structure: Structure) -> bool:
    return bool(structure.contours or structure.rasters)
