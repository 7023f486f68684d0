"""Opens the input of one series in a worker, and reads of it what the box of a crop depends on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuprep.compute.crop import Crop, crop_of
from gpuprep.compute.hu_slabs import Source
from gpuprep.core.plan import Plan, make_plan
from gpuprep.dicom.read import SeriesReader
from gpuprep.dicom.stack import Stack
from gpuprep.pipeline.task import Task

if TYPE_CHECKING:
    from gpuprep.compute.crop_box import FoundBox
    from gpuprep.core.recipe import Recipe
    from gpuprep.masks.place_on_slices import PlacedStructure
    from gpuprep.pipeline.convert_masks import Masked


@dataclass(frozen=True, slots=True, eq=False)
class SeriesInput:
    """Pixels and plan of a series."""

    plan: Plan
    pixels: tuple[SeriesReader, Source] | None
    """The reader, and the source for the image: the reader itself, or what it has read to find the box. None if no
    pixels are needed: for masks alone that are not cropped."""
    crop: Crop | None
    placed: tuple[list[PlacedStructure], Masked] | None
    """Structures on the slices, if the box depends on them; otherwise they are read when the image is written."""
    crop_s: float
    """Time for the box."""


def series_input(task: Task, stacked: Stack) -> SeriesInput:
    """Open the input of a series. If the recipe crops, read all of it, and find the box.

    Raises
    ------
    InputError
        If the files cannot be read.
    PlanError
        If the recipe cannot be applied to the series.
    """
    recipe, crop, crop_s = task.recipe, None, 0.0
    placed = placed_structures(task, stacked) if recipe.crop_kind == "mask" else None
    pixels: tuple[SeriesReader, Source] | None = None
    if recipe.image or recipe.crop:
        loops = task.backend.body == "loops"
        reader = SeriesReader(task.planned.series, recipe, loops=loops, stacked=stacked)
        pixels = reader, reader
        if recipe.crop:
            volume = reader.whole()
            pixels = reader, volume
            started = time.perf_counter()
            crop = crop_of(volume, recipe, _structures_box(placed[0], recipe, stacked) if placed else None)
            crop_s = time.perf_counter() - started
    plan = make_plan(stacked.geometry, recipe, stacked.placement, None if crop is None else crop.box)
    return SeriesInput(plan, pixels, crop, placed, crop_s)


def _structures_box(placed: list[PlacedStructure], recipe: Recipe, stacked: Stack) -> FoundBox:
    from gpuprep.masks.structures_box import structures_box

    return structures_box(placed, recipe.crop_names, stacked)


def placed_structures(task: Task, stacked: Stack) -> tuple[list[PlacedStructure], Masked]:
    """Return the structures of the segmentations of a series on its slices."""
    from gpuprep.pipeline.convert_masks import read_placed  # most series have no segmentation

    series = task.planned.series
    hide = task.names.of if task.names else None
    return read_placed(
        [s.path for s in task.planned.segmentations],
        stacked,
        task.recipe.masks,
        series.series_uid,
        series.frame_of_reference_uid,
        hide,
    )
