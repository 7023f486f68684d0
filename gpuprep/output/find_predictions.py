"""Finds predictions in a folder, and for each the output that it belongs to, by their names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from gpuprep.core.formatting import first_few, printable
from gpuprep.errors import PredictionError
from gpuprep.files.replacing import PART
from gpuprep.output.nnunet import case_names
from gpuprep.output.own_files import SIDECAR
from gpuprep.output.paths import WORK_FOLDER
from gpuprep.output.read_prediction import ending_of

_SLICE = re.compile(r"\d+\.tiff?", re.IGNORECASE)
_CHANNEL = "_0000"
"""Suffix that nnU-Net gives to images of the only channel."""


def find_predictions(top: Path) -> Iterator[str]:
    """Yield the paths of the predictions below a folder, relative to it: files, and folders of Zarr or of slices.

    Other files, such as nnU-Net's ``plans.json``, and finished outputs are passed over. Links are followed, into each
    folder once.
    """
    entered = set()
    for folder, subfolders, names in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            subfolders.clear()
            continue
        entered.add(real)
        here = os.path.relpath(folder, top)
        beside = "" if here == "." else f"{here}/"
        if SIDECAR in names:
            subfolders.clear()
            continue
        slices = {name for name in names if _SLICE.fullmatch(name)} if beside else set()
        if slices:
            yield here
        for name in sorted(set(names) - slices):
            if not name.startswith(PART) and ending_of(name) not in ("", ".zarr", ".ome.zarr"):
                yield beside + name
        arrays = {name for name in subfolders if name.lower().endswith(".zarr")}
        yield from sorted(beside + name for name in arrays)
        subfolders[:] = sorted(set(subfolders) - arrays)


def without_ending(prediction: str) -> str:
    """Return the path of a prediction without its ending."""
    return prediction[: len(prediction) - len(ending_of(prediction))]


def find_outputs(out: Path) -> list[str]:
    """Return the folders of finished outputs in OUT, relative to it."""
    found = []
    for folder, subfolders, names in os.walk(out):
        if Path(folder) == out:
            subfolders[:] = [name for name in subfolders if name != WORK_FOLDER]
        elif SIDECAR in names:
            found.append(os.path.relpath(folder, out))
    return sorted(found)


class OutputNames:
    """Names by which predictions refer to outputs.

    Parameters
    ----------
    folders : iterable of str
        Folders of outputs, relative to OUT.
    """

    def __init__(self, folders: Iterable[str]) -> None:
        self._folders = set(folders)
        self._cases = {case: folder for folder, case in case_names(self._folders).items()}
        self._last: dict[str, list[str]] = defaultdict(list)
        for folder in sorted(self._folders):
            self._last[PurePosixPath(folder).name].append(folder)

    def output_of(self, prediction: str) -> str:
        """Return the folder of the output that a prediction belongs to.

        The name of the prediction without its ending, or else that of its folder, is the output's path below OUT, its
        case name for nnU-Net, also with ``_0000``, or the last part of its path.

        Raises
        ------
        PredictionError
            If no output has such a name, or several do.
        """
        path = PurePosixPath(without_ending(prediction))
        for name in (path, path.parent):
            if str(name) in self._folders:
                return str(name)
            for case in (name.name, name.name.removesuffix(_CHANNEL)):
                if case in self._cases:
                    return self._cases[case]
                if len(found := self._last.get(case, [])) > 1:
                    raise PredictionError(
                        f"{len(found)} outputs have the name {printable(case)}: {printable(first_few(found))}; name "
                        "the prediction like the path of its output"
                    )
                if found:
                    return found[0]
        raise PredictionError(f"no output has the name {printable(path.name)}")
