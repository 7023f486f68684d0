"""Defines `Plan`: the recipe for one particular series as numbers, with nothing left to decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuprep.core.geometry import UNSEEN_MM, Geometry, Placement, Shape3, Turn
from gpuprep.core.hounsfield import AIR_HU
from gpuprep.core.recipe import LARGEST_AXIS, Recipe
from gpuprep.core.sampling import lost_samples
from gpuprep.core.stacking_rules import SeriesWarning
from gpuprep.errors import PlanError

LEANING = "leaning"
"""Code of the warning about a volume whose affine has a shear."""

MOST_VOXELS = 2**32
"""After resampling: 4000 slices of 1000 × 1000. More comes from a damaged header or a slip of the pen."""

BYTES = {"float32": 4, "uint8": 1, "uint16": 2, "int16": 2}


@dataclass(frozen=True, slots=True)
class Step:
    """One resampling step: the arguments of the library call, and of the operators that equal it."""

    source: Shape3
    target: Shape3
    order: int
    mode: str
    """Boundary rule in the words of `scipy.ndimage`."""
    grid_mode: bool
    """True: edges of the extent are kept; False: centres of the outer voxels are."""
    sigma: tuple[float, float, float]
    """Gaussian before it, in source voxels along (k, j, i); 0 for none."""
    along: tuple[tuple[float, ...] | None, tuple[float, ...] | None, tuple[float, ...] | None] = (None, None, None)
    """Where the samples of an axis truly lie, in voxels of `source`; None: one in each."""

    @property
    def blur_mode(self) -> str:
        """Boundary rule of the Gaussian: zeros beyond the border would darken it."""
        return "nearest" if self.mode == "constant" else self.mode

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not any(map(self.moves, range(3)))

    def moves(self, axis: int) -> bool:
        """Whether there is anything to do along an axis."""
        return self.source[axis] != self.target[axis] or self.along[axis] is not None

    @property
    def lost(self) -> tuple[tuple[int, int], ...]:
        """Planes of the output, as (axis, index), that `scipy.ndimage.zoom` leaves at 0: see `lost_samples`."""
        zoomed = [a for a in range(3) if self.moves(a) and (self.along[a] is None or self.sigma[a] > 0)]
        found = ((a, lost_samples(self.source[a], self.target[a], self.mode, self.grid_mode)) for a in zoomed)
        return tuple((axis, int(index)) for axis, indices in found for index in indices)

    def arguments(self, axis: int) -> dict[str, Any]:
        """Return what `gpuprep.compute.resample_matrix.matrix` wants to know of an axis."""
        return {
            "n_in": self.source[axis],
            "n_out": self.target[axis],
            "along": self.along[axis],
            "order": self.order,
            "mode": self.mode,
            "grid_mode": self.grid_mode,
            "sigma": self.sigma[axis],
            "blur_mode": self.blur_mode,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What happens to one series."""

    recipe: Recipe
    source: Geometry
    """Of the stack."""
    turn: Turn
    """What its axes become before anything else."""
    resampled: Geometry
    """After `resample`."""
    target: Geometry
    """Of the output."""
    resample: Step
    resize: Step
    """Identity where slices are padded or cropped instead."""
    offset: tuple[int, int]
    """Row and column of the resampled slice at which the output begins; negative where air is put around it."""
    scale: float
    """Output = (HU + `shift_hu`) · `scale`."""
    shift_hu: float

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
        """Air in output units, inside the window where there is one."""
        low, high = self.recipe.window_hu or (AIR_HU, AIR_HU)
        return (min(max(AIR_HU, low), high) + self.shift_hu) * self.scale

    @property
    def warnings(self) -> tuple[SeriesWarning, ...]:
        """What is doubtful about the image that this plan leads to."""
        found = []
        if self.resample.lost:
            planes = " and ".join(f"{('slice', 'row', 'column')[axis]} {index}" for axis, index in self.resample.lost)
            text = (
                f"{planes}, counted from 0 after resampling, hold 0 HU: align = 'corner' repeats scipy.ndimage.zoom, "
                "which finds them outside of the volume by rounding; align = 'edge' loses nothing"
            )
            found.append(SeriesWarning("lost-plane", text))
        if (lean_mm := self.target.lean_mm) > UNSEEN_MM:
            text = (
                f"slices lean by {lean_mm:.3g} mm in all, which only the affine says: programs that know no shear "
                "(ITK, ImageJ, nnU-Net) refuse the volume or take it for upright; --policy fix puts it upright"
            )
            found.append(SeriesWarning(LEANING, text))
        return tuple(found)

    @property
    def output_bytes(self) -> int:
        """Size of the image's voxels on disk, uncompressed."""
        return int(np.prod(self.target.shape, dtype=np.int64)) * BYTES[self.recipe.dtype]


def make_plan(source: Geometry, recipe: Recipe, placement: Placement | None = None) -> Plan:
    """Return the plan of `recipe` for a series on the grid `source`.

    The number of voxels along an axis is the extent over the asked-for spacing, rounded half to even, at least 1; the
    extent is then kept, so the effective spacing, and not the request, is in ``plan.target``. An axis whose number of
    voxels does not change is left alone.

    Parameters
    ----------
    source : Geometry
        Regular grid of the stack.
    recipe : Recipe
        What is asked for.
    placement : Placement, optional
        Where the slices lie in that grid, if not one in each layer.

    Raises
    ------
    PlanError
        If the output would be absurdly large, or ``fit="pad"`` meets a slice larger than its canvas.
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

    size = shape if recipe.size is None else (shape[0], *recipe.size)
    offset = (0, 0)
    resized = shape
    if recipe.fit == "stretch":
        resized = size
        target = resampled.resized(size)
    else:
        if recipe.fit == "pad" and (shape[1] > size[1] or shape[2] > size[2]):
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
    return Plan(recipe, source, turn, resampled, target, resample, resize, offset, scale, shift_hu)


def _along(placement: Placement | None, layers: int, turn: Turn) -> Any:
    """Return where samples truly lie along each axis after the turn, None for those that fill their grid."""
    along: list[tuple[float, ...] | None] = [None, None, None]
    if placement is not None and not np.array_equal(placement.along, np.arange(layers)):
        axis = turn.axes.index(0)
        places = layers - 1 - placement.along[::-1] if turn.flips[axis] else placement.along
        along[axis] = tuple(places.tolist())
    return tuple(along)


def _sigma(source: Shape3, target: Shape3, blur: bool) -> tuple[float, float, float]:
    """Scikit-image's rule for anti-aliasing: (shrink factor − 1)/2 voxels."""
    k, j, i = (max(0.0, (n / m - 1) / 2) if blur else 0.0 for n, m in zip(source, target, strict=True))
    return k, j, i


def _shape3(shape: list[int]) -> Shape3:
    k, j, i = shape
    return k, j, i


def _mm(geometry: Geometry) -> str:
    return " × ".join(f"{s:g}" for s in geometry.spacing_mm) + " mm"
