"""Selects the structures of a segmentation that lie in the frame of reference of a series.

The points of a region of interest (ROI) have a meaning only in the frame of reference that the ROI names. A structure
set may hold ROIs of several frames, each of another series. But the UIDs of frames are also what careless programs and
anonymisers break first, so a structure set all of whose ROIs agree on one frame is still believed to belong to the
series that it names.

References
----------
DICOM PS3.3, C.8.8.5 (Structure Set module: *Referenced Frame of Reference UID* of an ROI), C.7.4.1 (frames).
"""

from __future__ import annotations

from dataclasses import replace

from gpuprep.core.formatting import numbered, printable
from gpuprep.errors import SegmentationError
from gpuprep.masks.model import Segmentation, Structure

OTHER_FRAME = "mask-frame"
"""Code of the error where no frame of reference of a structure set is that of the series, and several might be."""


def in_frame_of(segmentation: Segmentation, series_uid: str, frame_uid: str) -> tuple[Segmentation, list[str]]:
    """Return a segmentation without the structures that lie in the frame of reference of another series.

    A structure whose frame of reference is not known stays. The frame of the series is, in this order: the one that the
    series names, if a structure is in it; the one under which the structure set lists the series; the only one that is
    left, apart from those under which it lists other series.

    Parameters
    ----------
    segmentation : Segmentation
        As it was read. Its `frame_of_reference_uid` becomes the one that was chosen.
    series_uid, frame_uid : str
        *Series Instance UID* and *Frame of Reference UID* of the series.

    Returns
    -------
    segmentation : Segmentation
    notes : list of str
        One for each structure that was left out although something is drawn in it.

    Raises
    ------
    SegmentationError
        If several frames of reference might be that of the series.
    """
    frames = {s.frame_of_reference_uid for s in segmentation.structures} - {""}
    own = {frame_uid} & frames
    if not own:
        lists = segmentation.series_by_frame
        own = {frame for frame in frames if series_uid in lists.get(frame, ())}
        if not own:
            listed = any(series_uid in series for series in lists.values())
            own = {frame for frame in frames if not (listed and lists.get(frame))}
            drawn = {s.frame_of_reference_uid for s in segmentation.structures if _is_drawn(s)} & own
            if len(drawn) > 1:
                raise SegmentationError(
                    f"its ROIs have {numbered(len(frames), 'frame')} of reference, none of which is that of the "
                    "series: it is not clear which of them are drawn on it; mend their Referenced Frame of Reference "
                    "UID, or leave the file out",
                    OTHER_FRAME,
                )
    kept = tuple(s for s in segmentation.structures if s.frame_of_reference_uid in own | {""})
    notes = [
        f"{printable(s.name)}: left out, it is drawn in another frame of reference than that of the series"
        for s in segmentation.structures
        if _is_drawn(s) and s.frame_of_reference_uid not in own | {""}
    ]
    chosen = segmentation.frame_of_reference_uid
    if own and chosen not in own:
        chosen = min(own)
    return replace(segmentation, structures=kept, frame_of_reference_uid=chosen), notes


def _is_drawn(structure: Structure) -> bool:
    return bool(structure.contours or structure.rasters)
