"""Reads which structure each label value stands for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpuprep.core.formatting import printable
from gpuprep.errors import RequestError
from gpuprep.output.nnunet import DATASET

LABELS = "labels.json"
"""File of an output folder with the label value of each structure."""


def read_label_names(file: Path) -> dict[int, str]:
    """Return the structure of each label value from a JSON file.

    Parameters
    ----------
    file : Path
        ``labels.json`` of an output folder, an object of values by name; or ``dataset.json`` of nnU-Net, which has such
        an object under "labels"; or an object of names by value.

    Raises
    ------
    RequestError
        If the file cannot be read, or is no such table.
    """
    try:
        found: Any = json.loads(file.read_text("utf-8"))
    except OSError as exc:
        raise RequestError(f"{file} cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"{file} is no JSON: {exc}") from exc
    table = found.get("labels", found) if isinstance(found, dict) else found
    if not isinstance(table, dict) or not table:
        raise RequestError(f"{file} is no table of labels: give an object of values by name, such as labels.json")
    if all(key.isdecimal() and isinstance(value, str) for key, value in table.items()):
        table = {name: int(value) for value, name in table.items()}
    names: dict[int, str] = {}
    for name, value in table.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RequestError(f"{file}: {printable(name)} has the value {value!r}: give a whole number for each name")
        if names.setdefault(value, name) != name:
            raise RequestError(f"{file}: {printable(names[value])} and {printable(name)} both have the value {value}")
    return {value: name for value, name in names.items() if value}


def label_names_beside(folder: Path) -> tuple[Path, dict[int, str]] | None:
    """Return the ``dataset.json`` in a folder, and its label values; None if there is no such table.

    nnU-Net writes that file beside its predictions.
    """
    with suppress(RequestError):  # of nnU-Net's training by regions, whose labels are no values
        return folder / DATASET, read_label_names(folder / DATASET)
    return None


def label_names_above(folders: Iterable[Path]) -> dict[int, str]:
    """Return the label values of the output folder that holds the output of a series; {} if there are none.

    Parameters
    ----------
    folders : iterable of Path
        The folders above that output.
    """
    for folder in folders:
        if (folder / "recipe.toml").is_file():
            return read_label_names(folder / LABELS) if (folder / LABELS).is_file() else {}
    return {}
