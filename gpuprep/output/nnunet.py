"""Arranges outputs as nnU-Net v2 wants to find them, by hard links, at the end of a run.

The folders of series stay what they are. ``OUT/imagesTr/<case>_0000.<ending>`` and ``OUT/labelsTr/<case>.<ending>`` are
the series that have a labelled voxel, ``OUT/imagesTs`` holds the others, and ``OUT/dataset.json`` says what the labels
mean. That file goes before anything of the view changes, and comes back last: without it, a view is not finished, and
nnU-Net does not take it for one. ``OUT/.gpuprep/nnunet.json`` knows what was put there; nothing else is ever removed.

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
from gpuprep.core.shard import WHOLE, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.output.folder_store import Output, write_text
from gpuprep.output.manifest import Manifest
from gpuprep.output.own_files import inside
from gpuprep.output.paths import WORKSHOP

Layout = Literal["folders", "nnunet"]
"""How OUT is laid out: a folder for each series, or these and the view for nnU-Net."""

FOLDERS = ("imagesTr", "labelsTr", "imagesTs")
DATASET = "dataset.json"
RECORD = "nnunet.json"
"""In the workshop: name and identity of each file of the view; "" for one that is being made or removed."""

LONGEST_CASE = 200
"""Characters; what is longer, or taken, gets a hash at its end."""


class Arranged(NamedTuple):
    """What a view holds."""

    training: int
    """Cases with a labelled voxel."""
    others: int
    """Cases without one."""
    apart: int
    """Series in OUT that are in no case: made by another recipe, or with slices that lean."""


def check(out: str | Path, recipe: Recipe, shard: Shard = WHOLE) -> None:
    """Raise unless a run with this recipe can be arranged at a place.

    Raises
    ------
    RequestError
        If nnU-Net cannot read what the recipe makes, if not all series are converted in this run, or something that is
        not of the view is in its place.
    """
    later = "run it once more with --layout nnunet: all is skipped and arranged"
    if not isinstance(out, Path):
        raise RequestError(f"--layout nnunet needs a folder on disk, not {out}: copy that to one, and {later}")
    if shard != WHOLE:
        raise RequestError(f"--layout nnunet is for all shards together: leave it out, gpuprep merge OUT, then {later}")
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
    _present(out, _record(out))


def arrange(output: Output, manifest: Manifest, recipe: Recipe) -> Arranged:
    """Make the view of all that the manifest has, made by a recipe; cases that are no longer there go.

    Raises
    ------
    RequestError
        If something that is not of the view is in its place.
    OSError
        If it cannot be written.
    """
    top = output.root
    wanted, dataset, arranged = _wanted(manifest, recipe)
    record = _record(top)
    there = _present(top, record)
    text = json.dumps(dataset, indent=1, ensure_ascii=False)
    kept = {name for name in there if name in wanted and _is_there(top / name, wanted[name])}
    if kept == there - {DATASET} == set(wanted) and DATASET in there and (top / DATASET).read_text("utf-8") == text:
        return arranged
    _write_record(output, {name: record[name] if name in kept else "" for name in (*there, *wanted, DATASET)})
    for name in sorted(there - kept, key=lambda name: name != DATASET):
        (top / name).unlink()
    for folder in FOLDERS:
        (top / folder).mkdir(exist_ok=True)
    for name in wanted.keys() - kept:
        _put(top / name, wanted[name])
    output.write_text(DATASET, text)
    _write_record(output, {name: _identity(top / name) for name in (*wanted, DATASET)})
    return arranged


def made(out: Path) -> set[str]:
    """Return the names, relative to OUT, of what was put there for nnU-Net."""
    return set(_record(out))


def _wanted(manifest: Manifest, recipe: Recipe) -> tuple[dict[str, Path | str], dict[str, Any], Arranged]:
    """Return what each file of the view leads to, or its text; the content of ``dataset.json``; and what there is."""
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
    # nnU-Net reads a sheared affine by nibabel, where ITK refuses it, and then takes the volume for upright.
    rows = [row[:3] for row in done if row[3] == recipe.sha256 and LEANING not in row[4]]
    cases = case_names(folder for folder, _, _ in rows)
    values = {value: name for name, value in manifest.label_values().items()}
    wanted: dict[str, Path | str] = {}
    training = highest = 0
    for folder, labels, spacing_mm in rows:
        drawn = _drawn(folder, labels or (), values)
        place, case = top / inside(folder), cases[folder]
        images = "imagesTr" if drawn else "imagesTs"
        wanted[f"{images}/{case}_0000{ending}"] = place / f"volume{ending}"
        if drawn:
            wanted[f"labelsTr/{case}{ending}"] = place / f"labels{ending}"
            training, highest = training + 1, max(highest, *drawn)
        if ending == ".tif":  # nnU-Net looks for the size of a voxel there
            spacing = json.dumps({"spacing": spacing_mm})
            wanted |= {f"{here}/{case}.json": spacing for here in ([images, "labelsTr"] if drawn else [images])}
    dataset: dict[str, Any] = {
        "channel_names": {"0": "CT"},
        # Those between that no case has are named too: values have to be consecutive.
        "labels": {"background": 0} | {_label(values[value]): value for value in range(1, highest + 1)},
        "numTraining": training,
        "file_ending": ending,
    }
    if ending == ".tif":  # else the reader of colour pictures is tried first
        dataset["overwrite_image_reader_writer"] = "Tiff3DIO"
    return wanted, dataset, Arranged(training, len(rows) - training, len(done) - len(rows))


def _drawn(folder: str, labels: tuple[dict[str, Any], ...], names: dict[int, str]) -> list[int]:
    """Return the values of the labels that have a voxel; raise OutputError for what no run has written."""
    try:
        drawn = [label["value"] for label in labels if label["voxels"]]
        if names.keys() >= set(range(1, max(drawn, default=0) + 1)):
            return drawn
    except (KeyError, TypeError):
        pass
    raise OutputError(f"the manifest does not say what the labels of {folder} mean: convert into another --out")


def _label(name: str) -> str:
    """Return the name of a structure in ``dataset.json``, where two words mean something else."""
    return f"{name} (structure)" if name in ("background", "ignore") else name


def case_names(folders: Iterable[str]) -> dict[str, str]:
    """Return a name of letters, digits, ``.``, ``_`` and ``-`` for each folder, distinct in lower case too."""
    plain = {folder: re.sub(r"[^A-Za-z0-9.-]+", "_", folder).strip("._-") or "case" for folder in folders}
    count = Counter(name.lower() for name in plain.values())
    return {
        folder: name
        if count[name.lower()] == 1 and len(name) <= LONGEST_CASE
        else f"{name[: LONGEST_CASE - 17]}-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
        for folder, name in plain.items()
    }


def _is_there(place: Path, content: Path | str) -> bool:
    if isinstance(content, str):
        return place.read_text("utf-8") == content
    return place.exists() and place.samefile(content)


def _put(place: Path, content: Path | str) -> None:
    if isinstance(content, str):
        place.write_text(content, "utf-8")
        return
    try:
        os.link(content, place)
    except OSError:  # not on this file system, or too many
        try:
            place.symlink_to(os.path.relpath(content, place.parent))
        except OSError:
            shutil.copy2(content, place)


def _present(out: Path, record: dict[str, str]) -> set[str]:
    """Return the files of the view that are there; raise if anything else is among them."""
    there = set()
    for name in _names(out):
        if record.get(name) not in ("", _identity(out / name)):
            raise RequestError(
                f"{out / name} is not what gpuprep put there for nnU-Net: move it away, or choose another --out"
            )
        there.add(name)
    return there


def _names(out: Path) -> Iterator[str]:
    if os.path.lexists(out / DATASET):
        yield DATASET
    for folder in FOLDERS:
        if (out / folder).is_dir():
            yield from (f"{folder}/{name}" for name in sorted(os.listdir(out / folder)))
        elif os.path.lexists(out / folder):
            yield folder


def _identity(file: Path) -> str:
    """Return what tells a file from another one in its place."""
    if file.is_symlink():
        return f"-> {os.readlink(file)}"
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _record(out: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        found: Any = json.loads((out / WORKSHOP / RECORD).read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _write_record(output: Output, record: dict[str, str]) -> None:
    write_text(output.workshop / RECORD, json.dumps(record))
