"""Provides finished outputs as tensors for a ``DataLoader`` of PyTorch.

References
----------
PyTorch documentation, ``torch.utils.data``: map-style datasets, seeds of workers, default collation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuprep.core.geometry import Shape3
from gpuprep.core.hounsfield import AIR_HU
from gpuprep.core.recipe import Recipe
from gpuprep.errors import RequestError
from gpuprep.output.object_store import resolve_out
from gpuprep.output.read_volume import Box, FinishedOutput, full_box
from gpuprep.output.records import DONE
from gpuprep.output.verify import AllManifests

try:
    import torch
    from torch.utils.data import Dataset
except ImportError as exc:
    raise ImportError(f"gpuprep.torch needs PyTorch ({exc}): pip install 'gpuprep[torch]'") from exc

Meta = dict[str, Any]


class CohortDataset(Dataset):  # type: ignore[misc, unused-ignore]
    """Dataset of the finished series of an output folder, or of patches of them, for 3D convolutions.

    Each item is a tuple ``(image, label, meta)``, from which the default collation of a ``DataLoader`` makes batches:

    * image: float32, shape (1, D, H, W). Unsigned integers are divided by their range, so that the window is [0, 1] in
      every dtype but int16, which holds HU.
    * label: int64. Shape (1, D, H, W) if the structures share a volume; (R, D, H, W) with zeros and ones for the
      structures of `structures` if each has its own volume; (0, D, H, W) without labels.
    * meta: "key" and "folder" of the series, "start" (index of the first voxel of a patch, negative if the patch begins
      in the margin), "spacing_mm", and "affine_lps" of the item, as tensors of float64.

    If the format allows it, only the voxels of an item are read: boxes of npy, zarr, and uncompressed nifti and
    tif-stack; slices of tif. A series is opened for each item anew, so any number of workers can be used.

    Parameters
    ----------
    out : path
        Output folder (``--out``) of a run, on disk.
    patches : tuple of int, optional
        Shape (d, h, w) of randomly placed patches. Smaller volumes are padded with air, without label. The positions
        are drawn from torch's generator: ``torch.manual_seed`` makes them reproducible, and workers differ. If absent,
        items are whole volumes, which must have equal shapes to form a batch.
    patches_per_volume : int
        Number of items per series.
    labelled : bool, optional
        True: only series with masks. False: all series, without labels. If absent: True if any series has masks, since
        series without masks may contain unlabelled structures.
    transform : callable, optional
        ``transform(image, label, meta)`` returns the item to use instead.

    Attributes
    ----------
    structures : dict of str to int
        Value in the label volume by structure name, or index of the channel.

    Raises
    ------
    RequestError
        If there is no output or no usable series, or the values of its series have different meanings.
    OutputError
        If a volume cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from torch.utils.data import DataLoader
    >>> import gpuprep
    >>> from gpuprep.testing import thorax, write_series
    >>> from gpuprep.torch import CohortDataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dicom, out = Path(folder, "dicom"), Path(folder, "out")
    ...     for seed in range(2):
    ...         _ = write_series(dicom / f"p{seed}", thorax((8, 64, 64), (3.0, 5.0, 5.0), seed), (3.0, 5.0, 5.0))
    ...     run = gpuprep.convert(dicom, out, gpuprep.Recipe(size=(128, 128), format="npy"), backend="cpu")
    ...     dataset = CohortDataset(out, patches=(16, 96, 96))
    ...     image, label, meta = next(iter(DataLoader(dataset, batch_size=2)))
    >>> image.shape, image.dtype
    (torch.Size([2, 1, 16, 96, 96]), torch.float32)
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        patches: Shape3 | None = None,
        patches_per_volume: int = 1,
        labelled: bool | None = None,
        transform: Callable[[torch.Tensor, torch.Tensor, Meta], Any] | None = None,
    ) -> None:
        place = resolve_out(out)
        if not isinstance(place, Path):
            raise RequestError(f"{out} is in an object store: copy it to a disk first")
        if patches is not None and not (len(patches) == 3 and all(isinstance(n, int) and n > 0 for n in patches)):
            raise RequestError(f"patches = {patches}: give three positive whole numbers, slices first")
        whole_number = isinstance(patches_per_volume, int) and patches_per_volume > 0
        if not whole_number or (patches is None and patches_per_volume != 1):
            raise RequestError(f"patches_per_volume = {patches_per_volume}: give a positive whole number, and patches")
        self.out = place
        self.patches = patches
        self.patches_per_volume = patches_per_volume
        self.transform = transform
        with closing(AllManifests(place)) as records:
            rows = [
                (folder, key, recipe, labels or ())
                for folder, key, recipe, status, hu_mean, labels in records.columns(
                    "folder", "key", "recipe_sha256", "status", "hu_mean", "labels"
                )
                if status in DONE and hu_mean is not None
            ]
        if labelled or (labelled is None and any(labels for *_, labels in rows)):
            rows = [row for row in rows if row[3]]
            self._shared = self._share_a_volume({recipe: folder for folder, _, recipe, _ in rows}.values())
            self.structures = self._structure_indices([labels for *_, labels in rows])
        else:
            self.structures, self._shared = {}, True
        if not rows:
            raise RequestError(f"{out} has no finished image{' with masks' if labelled else ''}: see gpuprep status")
        self._check_values({recipe: folder for folder, _, recipe, _ in rows}.values())
        self.series = sorted((folder, key) for folder, key, *_ in rows)

    def _check_values(self, folders: Iterable[str]) -> None:
        """Raise unless image values have the same meaning in all folders; `folders` has one per recipe."""
        found = {_value_meaning(FinishedOutput(self.out / folder).recipe) for folder in folders}
        if len(found) > 1:
            raise RequestError(
                f"{self.out} was converted with recipes whose values differ ({' and '.join(sorted(found))}): convert "
                "all series with one recipe, or use an --out for each"
            )

    def _share_a_volume(self, folders: Iterable[str]) -> bool:
        """Return whether structures share a label volume; `folders` has one per recipe."""
        layouts = {FinishedOutput(self.out / folder).recipe.masks.layout for folder in folders}
        if len(layouts) > 1:
            raise RequestError(
                f"{self.out} has label volumes and volumes per structure: convert all series with one layout of masks"
            )
        return layouts != {"per-roi"}

    def _structure_indices(self, labelled: list[tuple[dict[str, Any], ...]]) -> dict[str, int]:
        """Return the label value, or the channel, of each structure of the cohort by name."""
        found = {(label["name"], label["value"]) for labels in labelled for label in labels}
        if self._shared:
            return dict(sorted(found, key=lambda item: item[1]))
        return {name: n for n, name in enumerate(sorted({name for name, _ in found}))}

    def __len__(self) -> int:
        return len(self.series) * self.patches_per_volume

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        folder, key = self.series[index % len(self) // self.patches_per_volume]
        finished = FinishedOutput(self.out / folder)
        size = self.patches or finished.geometry.shape
        start = [_patch_start(length, wanted) for length, wanted in zip(finished.geometry.shape, size, strict=True)]
        box, margins = _box_and_margins(start, size, finished.geometry.shape)
        image = np.pad(_image(finished, box), margins, constant_values=_air_value(finished))
        label = np.pad(self._label(finished, box), [(0, 0), *margins])
        affine = finished.geometry.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        item = (
            torch.from_numpy(image[None]),
            torch.from_numpy(label),
            {
                "key": key,
                "folder": folder,
                "start": torch.tensor(start),
                "spacing_mm": torch.tensor(finished.geometry.spacing_mm, dtype=torch.float64),
                "affine_lps": torch.from_numpy(affine),
            },
        )
        return self.transform(*item) if self.transform else item

    def _label(self, finished: FinishedOutput, box: Box) -> NDArray[np.int64]:
        shape = tuple(s.stop - s.start for s in box)
        if not self.structures:
            return np.empty((0, *shape), dtype=np.int64)
        if self._shared:
            return finished.mask(next(iter(finished.files.values())), box)[None].astype(np.int64)
        label = np.zeros((len(self.structures), *shape), dtype=np.int64)
        for name, file in finished.files.items():
            label[self.structures[name]] |= finished.mask(file, box)
        return label


def _patch_start(length: int, wanted: int) -> int:
    """Return the start of a patch along an axis: random, or centred on the volume if the patch is larger."""
    if wanted >= length:
        return -((wanted - length) // 2)
    return int(torch.randint(length - wanted + 1, ()))


def _box_and_margins(start: list[int], size: Shape3, shape: Shape3) -> tuple[Box, list[tuple[int, int]]]:
    """Return the box of a patch inside the volume, and the voxels to pad before and after it along each axis."""
    box, margins = list(full_box(shape)), []
    for axis, (first, wanted, length) in enumerate(zip(start, size, shape, strict=True)):
        low, high = max(0, first), min(length, first + wanted)
        box[axis] = slice(low, high)
        margins.append((low - first, first + wanted - high))
    return (box[0], box[1], box[2]), margins


def _image(finished: FinishedOutput, box: Box) -> NDArray[np.float32]:
    """Return the image of a box, scaled to [0, 1] or in HU."""
    return finished.image(box).astype(np.float32) / np.float32(_window_top(finished))


def _value_meaning(recipe: Recipe) -> str:
    """Return the meaning of the values of returned images as text."""
    window = "all HU" if recipe.window_hu is None else "{:g} to {:g} HU".format(*recipe.window_hu)
    return window if recipe.dtype == "int16" or recipe.window_hu is None else f"{window} as 0 to 1"


def _air_value(finished: FinishedOutput) -> float:
    """Return the value for padding in returned images: the lower end of the window, or air without a window."""
    slope, intercept = finished.hu
    low, _ = finished.recipe.window_hu or (AIR_HU, None)
    return (low - intercept) / slope / _window_top(finished)


def _window_top(finished: FinishedOutput) -> int:
    """Return the stored value of the upper end of the window for unsigned integers, else 1."""
    return {"uint8": 255, "uint16": 65535}.get(finished.recipe.dtype, 1)
