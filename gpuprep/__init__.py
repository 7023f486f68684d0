"""Converts cohorts of CT DICOM to training-ready volumes, on a GPU or on CPUs.

>>> from pathlib import Path
>>> from gpuprep.testing import thorax, write_series
>>> files = write_series(Path("dicom"), thorax((12, 32, 32), (3, 9, 9)), (3, 9, 9))

>>> import gpuprep
>>> for series in gpuprep.discover("dicom"):
...     volume = gpuprep.process(gpuprep.read(series), gpuprep.Recipe(dtype="uint8"), backend="cpu")
...     print(volume.shape, volume.values.dtype)
(36, 512, 512) uint8
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpuprep._version import __version__

if TYPE_CHECKING:
    from gpuprep.compute.process import process as process
    from gpuprep.core.geometry import Geometry as Geometry
    from gpuprep.core.mask_options import Masks as Masks
    from gpuprep.core.recipe import Recipe as Recipe
    from gpuprep.core.restored import Restored as Restored
    from gpuprep.core.select_options import Select as Select
    from gpuprep.core.series import Series as Series
    from gpuprep.core.shard import Shard as Shard
    from gpuprep.core.stacking_rules import Rules as Rules
    from gpuprep.core.volume import StoredVolume as StoredVolume
    from gpuprep.core.volume import Volume as Volume
    from gpuprep.dicom.audit import Audit as Audit
    from gpuprep.dicom.audit import audit as audit
    from gpuprep.dicom.discover import discover as discover
    from gpuprep.dicom.read import read as read
    from gpuprep.dicom.stack import stack as stack
    from gpuprep.masks.read import read_segmentation as read_segmentation
    from gpuprep.pipeline.cohort import convert as convert
    from gpuprep.pipeline.events import Listener as Listener
    from gpuprep.pipeline.events import Run as Run
    from gpuprep.pipeline.load import load as load
    from gpuprep.pipeline.options import ConvertOptions as ConvertOptions
    from gpuprep.pipeline.planned_series import PlannedSeries as PlannedSeries
    from gpuprep.pipeline.pseudonyms import Pseudonyms as Pseudonyms
    from gpuprep.pipeline.restore import restore as restore
    from gpuprep.pipeline.scan import Scan as Scan
    from gpuprep.pipeline.scan import scan as scan

_MODULES = {
    "Audit": "dicom.audit",
    "audit": "dicom.audit",
    "convert": "pipeline.cohort",
    "ConvertOptions": "pipeline.options",
    "discover": "dicom.discover",
    "Geometry": "core.geometry",
    "Listener": "pipeline.events",
    "load": "pipeline.load",
    "Masks": "core.mask_options",
    "PlannedSeries": "pipeline.planned_series",
    "process": "compute.process",
    "Pseudonyms": "pipeline.pseudonyms",
    "read": "dicom.read",
    "read_segmentation": "masks.read",
    "Recipe": "core.recipe",
    "restore": "pipeline.restore",
    "Restored": "core.restored",
    "Rules": "core.stacking_rules",
    "Run": "pipeline.events",
    "Scan": "pipeline.scan",
    "scan": "pipeline.scan",
    "Select": "core.select_options",
    "Series": "core.series",
    "Shard": "core.shard",
    "stack": "dicom.stack",
    "StoredVolume": "core.volume",
    "Volume": "core.volume",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import gpuprep` is fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
