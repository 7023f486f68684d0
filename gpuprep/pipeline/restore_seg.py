"""Writes restored labels as DICOM SEG, with the original images of their series."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from gpuprep.core.formatting import first_few, printable
from gpuprep.core.mask_options import Masks
from gpuprep.core.restored import Restored
from gpuprep.core.series import Series
from gpuprep.core.stacking_rules import Rules
from gpuprep.dicom.discover import discover
from gpuprep.errors import NothingFoundError, OutputError
from gpuprep.masks.structure_codes import coded
from gpuprep.output.dicom_seg import SegOptions, write_seg
from gpuprep.output.originals import originals_among
from gpuprep.output.read_volume import FinishedOutput
from gpuprep.pipeline.pseudonyms import Pseudonyms


@dataclass(frozen=True, slots=True)
class SegRequest:
    """What a SEG needs besides labels."""

    paths: tuple[str, ...]
    """Folders, files or archives with the original images."""
    options: SegOptions = field(default_factory=SegOptions)
    masks: Masks | None = None
    """Table with the codes of structures; None: that of the recipe of the output."""
    pseudonyms: Pseudonyms | None = None
    """Needed for outputs that have pseudonyms."""

    def series(self, rules: Rules) -> list[Series]:
        """Return all series of the original images."""
        found = discover(self.paths, rules)
        return [s if self.pseudonyms is None else self.pseudonyms.series(s) for s in found]


def series_by_key(request: SegRequest, outputs: Iterable[Path]) -> dict[str, Series]:
    """Return the original series by key, as the recipes of outputs group images; they are searched once."""
    rules = set()
    for folder in outputs:
        with suppress(OutputError):  # a damaged output fails when it is restored, and stops no other
            rules.add(FinishedOutput(folder).recipe.rules)
    return {s.key: s for rule in sorted(rules, key=repr) for s in request.series(rule)}


def write_restored_seg(
    restored: Restored, output: FinishedOutput, series: Sequence[Series], request: SegRequest, made: float, file: Path
) -> tuple[str, ...]:
    """Write labels as DICOM SEG that refers to the original images, and return notes.

    Parameters
    ----------
    restored : Restored
        Labels on the slices of the series, with the names of all labels.
    output : FinishedOutput
        Output from which they were restored.
    series : sequence of Series
        Series among which the original is.
    request : SegRequest
        Options and codes.
    made : float
        Time of the prediction, in seconds since 1970.
    file : Path
        The file; it appears when it is complete.

    Raises
    ------
    InputError
        If the originals are not there, or have changed.
    RequestError
        If a label has no name, or highdicom is not installed.
    OutputError
        If the file cannot be written.
    """
    try:
        stack = originals_among(series, output)
    except NothingFoundError as exc:
        raise NothingFoundError(f"{exc}; searched: {first_few([printable(p) for p in request.paths])}") from exc
    masks = request.masks or output.recipe.masks
    codes = {name: coded(name, masks.code(name)) for name in restored.names.values()}
    options = replace(request.options, made=datetime.fromtimestamp(int(made)))
    return write_seg(restored.values, restored.names, stack.slices, codes, file, options)


def time_of(prediction: Path) -> float:
    """Return the time of a prediction: of its file, or of the last file in its folder."""
    if prediction.is_dir():
        return max((os.path.getmtime(f) for f in prediction.rglob("*") if f.is_file()), default=0.0)
    return os.path.getmtime(prediction)
