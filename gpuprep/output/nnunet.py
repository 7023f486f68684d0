"""Arranges outputs in the folder layout of nnU-Net v2, by hard links, at the end of a run.

The folders of series do not change. This *view* of them has images and labels of the series with a labelled voxel as
``OUT/imagesTr/<case>_0000.<ending>`` and ``OUT/labelsTr/<case>.<ending>``, images of the other series in
``OUT/imagesTs``, and the names of the labels in ``OUT/dataset.json``. ``dataset.json`` is removed before the view
changes and written last, and each step is on disk before the next, so nnU-Net does not accept an unfinished view.
``OUT/.gpuprep/nnunet.json`` lists the files of the view; no other file is ever removed.

References
----------
nnU-Net v2, ``documentation/dataset_format.md``; ``nnunetv2.imageio.tif_reader_writer.Tiff3DIO``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gpuprep.core.plan import LEANING
from gpuprep.core.recipe import Recipe
from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files.replacing import flush, make_folder
from gpuprep.output.folder_store import Output, write_text
from gpuprep.output.manifest import Manifest
from gpuprep.output.own_files import checked_folder
from gpuprep.output.paths import WORK_FOLDER

Layout = Literal["folders", "nnunet"]
"""Layout of OUT: a folder for each series; nnunet: these folders and the view for nnU-Net."""

FOLDERS = ("imagesTr", "labelsTr", "imagesTs")
DATASET = "dataset.json"
RECORD = "nnunet.json"
"""File in the work folder with name and identity of each file of the view; "" while one is being made or removed."""

LONGEST_CASE = 200
"""Maximum length of a case name in characters. A name that is longer or not unique ends in a hash."""


class NnunetCases(NamedTuple):
    """Number of series in a view, and of those left out."""

    training: int
    """Cases with a labelled voxel."""
    others: int
    """Cases without one."""
    apart: int
    """Series in OUT that are left out: made by another recipe, or with leaning slices."""


def check(out: str | Path, recipe: Recipe, shard: Shard = WHOLE_COHORT) -> None:
    """Raise if a run with this recipe cannot make a view in OUT.

    Raises
    ------
    RequestError
        If nnU-Net cannot read outputs of the recipe, if the run converts a shard only, or if a file that is not part of
        the view is in its way.
    """
    later = "run it once more with --layout nnunet, which skips all series and arranges them"
    if not isinstance(out, Path):
        raise RequestError(f"--layout nnunet needs a folder on disk, not {out}: copy that to one, and {later}")
    if shard != WHOLE_COHORT:
        raise RequestError(
            f"--layout nnunet cannot arrange a single shard: leave it out, run gpuprep merge OUT, then {later}"
        )
    if recipe.ending not in (".nii.gz", ".tif"):
        raise RequestError(
            f"--layout nnunet cannot be made of --format {recipe.format} --compression {recipe.compression}: choose "
            "--format nifti --compression zlib, or --format tif-stack"
        )
    if recipe.masks.layout != "labels":
        raise RequestError(
            f"--layout nnunet needs one volume of labels, not --mask-layout {recipe.masks.layout}: choose "
            "--mask-layout labels"
        )
    if not recipe.image:
        raise RequestError("--layout nnunet needs images: use gpuprep convert --masks")
    _existing(out, _record(out))


def arrange(output: Output, manifest: Manifest, recipe: Recipe) -> NnunetCases:
    """Make or update the view of all outputs in the manifest that a recipe made; remove cases that no longer exist.

    Raises
    ------
    RequestError
        If a file that is not part of the view is in its way.
    OSError
        If the view cannot be written.
    """
    top = output.root
    wanted, dataset, arranged = _planned(manifest, recipe)
    record = _record(top)
    existing = _existing(top, record)
    text = json.dumps(dataset, indent=1, ensure_ascii=False)
    kept = {name for name in existing if name in wanted and _is_current(top / name, wanted[name])}
    complete = kept == existing - {DATASET} == set(wanted) and DATASET in existing
    if complete and (top / DATASET).read_text("utf-8") == text:
        return arranged
    _write_record(output, {name: record[name] if name in kept else "" for name in (*existing, *wanted, DATASET)})
    flush(output.work_folder)
    if DATASET in existing:
        (top / DATASET).unlink()
        flush(top)
    for name in existing - kept - {DATASET}:
        (top / name).unlink()
    for folder in FOLDERS:
        make_folder(top / folder)
    for name in wanted.keys() - kept:
        _put(top / name, wanted[name])
    for folder in FOLDERS:
        flush(top / folder)
    output.write_text(DATASET, text)
    _write_record(output, {name: _identity(top / name) for name in (*wanted, DATASET)})
    return arranged


def view_files(out: Path) -> set[str]:
    """Return the files of the view, relative to OUT."""
    return set(_record(out))


def _planned(manifest: Manifest, recipe: Recipe) -> tuple[dict[str, Path | str], dict[str, Any], NnunetCases]:
    """Return the link target or text of each file of the view, the content of ``dataset.json``, and the counts."""
    top, ending = manifest.path.parent, recipe.ending
    done = list(
        manifest.columns(
            "folder",
            "labels",
            "spacing_mm",
            "recipe_sha256",
            "codes",
            of="new output",
        )
    )
    # ITK refuses a sheared affine; nnU-Net then reads it with nibabel and ignores the shear.
    rows = [row[:3] for row in done if row[3] == recipe.sha256 and LEANING not in row[4]]
    cases = case_names(folder for folder, _, _ in rows)
    values = {value: name for name, value in manifest.label_values().items()}
    wanted: dict[str, Path | str] = {}
    training = highest = 0
    for folder, labels, spacing_mm in rows:
        present = _present_labels(folder, labels or (), values)
        path, case = top / checked_folder(folder), cases[folder]
        images = "imagesTr" if present else "imagesTs"
        wanted[f"{images}/{case}_0000{ending}"] = path / f"volume{ending}"
        if present:
            wanted[f"labelsTr/{case}{ending}"] = path / f"labels{ending}"
            training, highest = training + 1, max(highest, *present)
        if ending == ".tif":  # nnU-Net reads the voxel spacing of a TIFF from a JSON file beside it
            spacing = json.dumps({"spacing": spacing_mm})
            wanted |= {f"{name}/{case}.json": spacing for name in ([images, "labelsTr"] if present else [images])}
    dataset: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        # nnU-Net needs consecutive values, so values without a voxel in any case are named too.
        "labels": {"background": 0} | {_label(values[value]): value for value in range(1, highest + 1)},
        "numTraining": training,
        "file_ending": ending,
    }
    if ending == ".tif":  # otherwise nnU-Net tries its reader for natural images first
        dataset["overwrite_image_reader_writer"] = "Tiff3DIO"
    return wanted, dataset, NnunetCases(training, len(rows) - training, len(done) - len(rows))


def _present_labels(folder: str, labels: tuple[dict[str, Any], ...], names: dict[int, str]) -> list[int]:
    """Return the values of the labels that have a voxel; raise OutputError if the manifest does not name them all."""
    try:
        present = [label["value"] for label in labels if label["voxels"]]
        if names.keys() >= set(range(1, max(present, default=0) + 1)):
            return present
    except (KeyError, TypeError):
        pass
    raise OutputError(f"the manifest does not say what the labels of {folder} mean: convert into another --out")


def _label(name: str) -> str:
    """Return the name of a structure in ``dataset.json``, where "background" and "ignore" are reserved."""
    return f"{name} (structure)" if name in ("background", "ignore") else name


def case_names(folders: Iterable[str]) -> dict[str, str]:
    """Return a case name of letters, digits, ``.``, ``_`` and ``-`` for each folder, unique even without case."""
    plain = {folder: re.sub(r"[^A-Za-z0-9.-]+", "_", folder).strip("._-") or "case" for folder in folders}
    count = Counter(name.lower() for name in plain.values())
    return {
        folder: name
        if count[name.lower()] == 1 and len(name) <= LONGEST_CASE
        else f"{name[: LONGEST_CASE - 17]}-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
        for folder, name in plain.items()
    }


def _is_current(file: Path, content: Path | str) -> bool:
    if isinstance(content, str):
        return file.read_text("utf-8") == content
    return file.exists() and file.samefile(content)


def _put(file: Path, content: Path | str) -> None:
    """Write a text, or make a link to a file: hard or symbolic, or a copy if the file system has no links."""
    if isinstance(content, str):
        file.write_text(content, "utf-8")
        flush(file)
        return
    try:
        os.link(content, file)
    except OSError:  # no hard links on this file system, or too many to one file
        try:
            file.symlink_to(os.path.relpath(content, file.parent))
        except OSError:
            shutil.copy2(content, file)
            flush(file)


def _existing(out: Path, record: dict[str, str]) -> set[str]:
    """Return the files of the view that exist; raise RequestError if any other file is among them."""
    existing = set()
    for name in _names(out):
        if record.get(name) not in ("", _identity(out / name)):
            raise RequestError(
                f"{out / name} is not a file that gpuprep made for nnU-Net, or it has changed since: move it away, or "
                "choose another --out"
            )
        existing.add(name)
    return existing


def _names(out: Path) -> Iterator[str]:
    if os.path.lexists(out / DATASET):
        yield DATASET
    for folder in FOLDERS:
        if (out / folder).is_dir():
            yield from (f"{folder}/{name}" for name in sorted(os.listdir(out / folder)))
        elif os.path.lexists(out / folder):
            yield folder


def _identity(file: Path) -> str:
    """Return size and modification time, or the link target; they differ if the file was replaced."""
    if file.is_symlink():
        return f"-> {os.readlink(file)}"
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _record(out: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        found: Any = json.loads((out / WORK_FOLDER / RECORD).read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _write_record(output: Output, record: dict[str, str]) -> None:
    write_text(output.work_folder / RECORD, json.dumps(record))
