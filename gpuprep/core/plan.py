"""Defines `Plan`: a recipe applied to the grid of one series, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuprep.core.axis_part import AxisPart
from gpuprep.core.geometry import NEGLIGIBLE_SHIFT_MM, Geometry, IndexBox, Placement, Shape3, Turn
from gpuprep.core.hounsfield import AIR_HU
from gpuprep.core.recipe import LARGEST_AXIS, Recipe
from gpuprep.core.sampling import lost_samples
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.errors import PlanError

LEANING = "leaning"
"""Code of the warning about a volume whose affine has a shear."""

CROP_NOT_FOUND = "crop-not-found"
"""Code of a series in which the part to which the recipe crops is not found."""

MOST_VOXELS = 2**32
"""Upper limit after resampling: 4000 slices of 1000 × 1000. More is treated as a damaged header or a typo."""

BYTES_PER_VOXEL = {"float32": 4, "uint8": 1, "uint16": 2, "int16": 2}
"""Bytes per voxel by output type."""


@dataclass(frozen=True, slots=True)
class Step:
    """One resampling step: the arguments of `scipy.ndimage.zoom`, or of the equivalent matrices."""

    source: Shape3
    """Shape before the step."""
    target: Shape3
    """Shape after the step."""
    order: int
    """Spline order."""
    mode: str
    """Boundary rule, as `scipy.ndimage` names it."""
    grid_mode: bool
    """True: the outer edges of the volume are kept; False: the centres of the outer voxels are kept."""
    sigma: tuple[float, float, float]
    """Standard deviation of the Gaussian before the step, in source voxels along (k, j, i); 0 for no Gaussian."""
    along: tuple[tuple[float, ...] | None, tuple[float, ...] | None, tuple[float, ...] | None] = (None, None, None)
    """Positions of the input samples per axis, in voxels before the step; None if sample n lies at n."""
    parts: tuple[AxisPart | None, AxisPart | None, AxisPart | None] = (None, None, None)
    """Part of each axis that is resampled, to which `source` and `target` are restricted; None for a whole axis."""

    @property
    def blur_mode(self) -> str:
        """Boundary rule of the Gaussian; never "constant", since zeros beyond the border would darken it."""
        return "nearest" if self.mode == "constant" else self.mode

    @property
    def is_identity(self) -> bool:
        """Whether the step changes no axis."""
        return not any(map(self.resamples, range(3)))

    def resamples(self, axis: int) -> bool:
        """Return whether the step resamples an axis."""
        part = self.parts[axis]
        resampled = part is not None and part.n_in != part.n_out
        return resampled or self.source[axis] != self.target[axis] or self.along[axis] is not None

    def whole(self, axis: int) -> tuple[int, int]:
        """Return the number of voxels of the whole axis before and after the step."""
        part = self.parts[axis]
        return (self.source[axis], self.target[axis]) if part is None else (part.n_in, part.n_out)

    @property
    def lost_planes(self) -> tuple[tuple[int, int], ...]:
        """Output planes, as (axis, index), that `scipy.ndimage.zoom` leaves at 0: see `lost_samples`."""
        zoomed = [a for a in range(3) if self.resamples(a) and (self.along[a] is None or self.sigma[a] > 0)]
        lost = []
        for axis in zoomed:
            part = self.parts[axis]
            indices = lost_samples(*self.whole(axis), self.mode, self.grid_mode) - (0 if part is None else part.start)
            lost += [(axis, int(index)) for index in indices if 0 <= index < self.target[axis]]
        return tuple(lost)

    def matrix_arguments(self, axis: int) -> dict[str, Any]:
        """Return the keyword arguments of `gpuprep.compute.resample_matrix.matrix` for an axis."""
        n_in, n_out = self.whole(axis)
        return {
            "n_in": n_in,
            "n_out": n_out,
            "part": self.parts[axis],
            "along": self.along[axis],
            "order": self.order,
            "mode": self.mode,
            "grid_mode": self.grid_mode,
            "sigma": self.sigma[axis],
            "blur_mode": self.blur_mode,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Grids, resampling steps and scaling of one series."""

    recipe: Recipe
    """Recipe that the plan applies."""
    source: Geometry
    """Grid of the stack."""
    crop: IndexBox | None
    """Box of `source` to which the output is cropped; None for all of it."""
    read: IndexBox
    """Slices, rows and columns of the stack, as acquired, that are read."""
    turn: Turn
    """Axis permutation and reversal of the stack, before any other step."""
    resampled: Geometry
    """Grid after `resample`, which is cropped already."""
    target: Geometry
    """Grid of the output."""
    resample: Step
    """Resampling to the recipe's spacing."""
    resize: Step
    """Resampling of each slice to the recipe's size; identity if slices are padded or cropped instead."""
    offset: tuple[int, int]
    """Row and column of the resampled slice at which the output begins; negative if air is added around it."""
    scale: float
    """Output units per HU: output = (HU + `shift_hu`) · `scale`."""
    shift_hu: float
    """HU added before scaling."""
    placement: Placement | None
    """Positions of the slices in `source`; None if slice k is layer k of it."""

    @property
    def shifted(self) -> bool:
        """Whether slices have to be shifted sideways to their positions in `source`."""
        return self.placement is not None and self.placement.shift is not None

    @property
    def has_final_size(self) -> bool:
        """Whether slices are neither resized nor cropped nor padded after they have been resampled."""
        return self.resampled.shape == self.target.shape

    @property
    def hu_slope(self) -> float:
        """HU per output unit."""
        return 1 / self.scale

    @property
    def hu_intercept(self) -> float:
        """HU of output value 0."""
        return 0.0 - self.shift_hu

    @property
    def air(self) -> float:
        """Value of air in output units, clipped to the window if there is one."""
        low, high = self.recipe.window_hu or (AIR_HU, AIR_HU)
        return (min(max(AIR_HU, low), high) + self.shift_hu) * self.scale

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """Warnings about the image that this plan produces."""
        found = []
        if self.resample.lost_planes:
            planes = " and ".join(
                f"{('slice', 'row', 'column')[axis]} {index}" for axis, index in self.resample.lost_planes
            )
            text = (
                f"{planes}, counted from 0 after resampling, hold 0 HU: with align = 'corner', as in "
                "scipy.ndimage.zoom, rounding puts them outside the volume; align = 'edge' loses no plane"
            )
            found.append(SeriesWarning("lost-plane", text))
        if (lean_mm := self.target.lean_mm) > NEGLIGIBLE_SHIFT_MM:
            text = (
                f"slices lean by {lean_mm:.3g} mm in all, so the affine has a shear: programs that do not support "
                "shears (ITK, ImageJ, nnU-Net) refuse the volume or ignore the shear; --policy fix removes it"
            )
            found.append(SeriesWarning(LEANING, text))
        return tuple(found)

    @property
    def output_bytes(self) -> int:
        """Uncompressed size of the output image in bytes."""
        return int(np.prod(self.target.shape, dtype=np.int64)) * BYTES_PER_VOXEL[self.recipe.dtype]


def make_plan(
    source: Geometry, recipe: Recipe, placement: Placement | None = None, crop: IndexBox | None = None
) -> Plan:
    """Return the plan of `recipe` for a series on the grid `source`.

    The number of voxels along an axis is the extent divided by the requested spacing, rounded half to even, at least 1.
    The extent is kept, so ``plan.target`` has the effective spacing instead of the requested one. An axis whose number
    of voxels does not change is not resampled.

    Parameters
    ----------
    source : Geometry
        Regular grid of the stack.
    recipe : Recipe
        Requested conversion.
    placement : Placement, optional
        Positions of the slices in that grid; None if slice k is layer k of it.
    crop : IndexBox, optional
        Box of `source` to keep. The output has all voxels of the whole output that touch it, before slices get their
        final size. None for all of it, or if the recipe crops and the box is not known yet.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If the output exceeds `LARGEST_AXIS` or `MOST_VOXELS`, or a slice is too large for ``fit="pad"``.
    """
    corner = recipe.align == "corner"
    turn = source.to_axial if recipe.orient == "LPS" else Turn()
    grid = source.turned(turn)
    shape = grid.shape
    if recipe.spacing_mm is not None:
        pairs = zip(grid.shape, grid.spacing_mm, recipe.spacing_mm, strict=True)
        # The inner rounding removes float noise: 133 slices of 2.5 mm are 332.5 mm, not 332.50000000000006.
        shape = _shape3([max(1, round(round(n * s / t, 6))) for n, s, t in pairs])
        if max(shape) > LARGEST_AXIS:
            raise PlanError(
                f"{grid.shape} voxels of {_mm(grid)} would become {shape} at {recipe.spacing_mm} mm: "
                f"more than {LARGEST_AXIS} along an axis; ask for a coarser --spacing"
            )
        if np.prod(shape, dtype=np.float64) > MOST_VOXELS:
            raise PlanError(
                f"{grid.shape} voxels of {_mm(grid)} would become {shape} at {recipe.spacing_mm} mm: more than "
                f"{MOST_VOXELS:.1e} voxels; ask for a coarser --spacing"
            )
    resampled = grid.corner_resized(shape) if corner else grid.resized(shape)
    blur = recipe.anti_alias in ("resample", "both")
    mode = "constant" if corner else "nearest"
    along = _along(placement, source.shape[0], turn)
    resample = Step(grid.shape, shape, recipe.order, mode, not corner, _sigma(grid.shape, shape, blur), along)
    read = IndexBox((0, 0, 0), source.shape if placement is None else (len(placement.along), *placement.matrix))
    if crop is not None and crop.shape != source.shape:
        shifted = placement is not None and placement.shift is not None
        resample, read = _cropped(resample, read, crop, turn, shifted=shifted)
        resampled = resampled.cropped(_starts(resample), resample.target)
        shape = resample.target

    size = shape if recipe.size is None else (shape[0], *recipe.size)
    offset = (0, 0)
    resized = shape
    if recipe.fit == "stretch":
        resized = size
        target = resampled.resized(size)
    else:
        known = recipe.crop is None or crop is not None
        if known and recipe.fit == "pad" and (shape[1] > size[1] or shape[2] > size[2]):
            raise PlanError(
                f"slices of {shape[1]} × {shape[2]} do not fit into {size[1]} × {size[2]}, and fit = 'pad' never cuts: "
                "use --fit crop, a larger --size or a coarser --spacing"
            )
        offset = ((shape[1] - size[1]) // 2, (shape[2] - size[2]) // 2)
        target = resampled.cropped((0, *offset), size)
    blur = recipe.anti_alias in ("resize", "both")
    mode = "mirror" if corner else "nearest"
    resize = Step(shape, resized, 1, mode, True, _sigma(shape, resized, blur))

    scale, shift_hu = 1.0, 0.0
    if recipe.window_hu is not None and recipe.dtype != "int16":
        low, high = recipe.window_hu
        top = {"float32": 1.0, "uint8": 255.0, "uint16": 65535.0}[recipe.dtype]
        scale, shift_hu = top / (high - low), -low
    if crop is not None and crop.shape == source.shape:
        crop = None
    return Plan(
        recipe, source, crop, read, turn, resampled, target, resample, resize, offset, scale, shift_hu, placement
    )


def _along(placement: Placement | None, layers: int, turn: Turn) -> Any:
    """Return the positions of the input samples per axis after the turn; None for regularly sampled axes."""
    along: list[tuple[float, ...] | None] = [None, None, None]
    if placement is not None and not np.array_equal(placement.along, np.arange(layers)):
        axis = turn.axes.index(0)
        positions = layers - 1 - placement.along[::-1] if turn.flips[axis] else placement.along
        along[axis] = tuple(positions.tolist())
    return tuple(along)


def _cropped(step: Step, read: IndexBox, crop: IndexBox, turn: Turn, *, shifted: bool) -> tuple[Step, IndexBox]:
    """Return the part of a step that makes the voxels in a box of the stack, and the part of the stack it reads.

    Slices that are shifted sideways are read as a whole, since each is shifted by another distance.
    """
    parts: list[AxisPart] = []
    start, stop = list(read.start), list(read.stop)
    for axis, (source_axis, flip) in enumerate(zip(turn.axes, turn.flips, strict=True)):
        n_in, n_out = step.source[axis], step.target[axis]
        low, high = crop.start[source_axis], crop.stop[source_axis]
        part = AxisPart.of(
            n_in,
            n_out,
            (n_in - high, n_in - low) if flip else (low, high),
            corner=not step.grid_mode,
            along=step.along[axis],
            order=step.order,
            sigma=step.sigma[axis],
            cut=source_axis == 0 or not shifted,
        )
        parts.append(part)
        if source_axis == 0 or not shifted:
            count = stop[source_axis]
            span = (count - part.high, count - part.low) if flip else (part.low, part.high)
            start[source_axis], stop[source_axis] = span
    source = _shape3([part.samples for part in parts])
    target = _shape3([part.outputs for part in parts])
    k, j, i = parts
    return replace(step, source=source, target=target, parts=(k, j, i)), IndexBox(_shape3(start), _shape3(stop))


def _starts(step: Step) -> Shape3:
    """Return the first output of each axis that a step makes."""
    return _shape3([0 if part is None else part.start for part in step.parts])


def _sigma(source: Shape3, target: Shape3, blur: bool) -> tuple[float, float, float]:
    """Return scikit-image's standard deviation for anti-aliasing: (shrink factor − 1)/2 voxels per axis."""
    k, j, i = (max(0.0, (n / m - 1) / 2) if blur else 0.0 for n, m in zip(source, target, strict=True))
    return k, j, i


def _shape3(shape: list[int]) -> Shape3:
    k, j, i = shape
    return k, j, i


def _mm(geometry: Geometry) -> str:
    return " × ".join(f"{s:g}" for s in geometry.spacing_mm) + " mm"
