"""Defines `Recipe`, the immutable settings of a conversion, with its TOML format, and the presets."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from gpuprep.core.mask_options import Masks
from gpuprep.core.select_options import Select
from gpuprep.core.stacking_rules import GroupBy, Policy, Rules
from gpuprep.errors import RecipeError

Orient = Literal["native", "LPS"]
Padding = Literal["air", "minus2000-to-0", "keep"]
Align = Literal["edge", "corner"]
AntiAlias = Literal["none", "resample", "resize", "both"]
CropMissing = Literal["whole", "reject"]
Fit = Literal["stretch", "pad", "crop"]
Format = Literal["tif", "tif-stack", "nifti", "zarr", "npy"]
Dtype = Literal["float32", "uint8", "uint16", "int16"]
Compression = Literal["none", "zlib", "zstd"]

ENDINGS: dict[str, dict[str, str]] = {
    "tif": {"none": "", "zlib": "", "zstd": ""},
    "tif-stack": {"none": ".tif", "zlib": ".tif", "zstd": ".tif"},
    "nifti": {"none": ".nii", "zlib": ".nii.gz"},
    "zarr": {"none": ".ome.zarr", "zlib": ".ome.zarr", "zstd": ".ome.zarr"},
    "npy": {"none": ".npy"},
}
"""File name suffix by format and supported compression; "" for a folder of slices."""

REQUIRED_PACKAGES: dict[str, tuple[tuple[str, int], ...]] = {
    "nifti": (("nibabel", 5), ("isal", 1)),
    "zarr": (("zarr", 3),),
}
"""Required packages by format, each with its minimum major version; the format's extra installs them."""

LARGEST_AXIS = 16384
"""Upper limit of voxels per axis; larger values are treated as typos."""

_DEFAULT_RULES = Rules()

SMALLEST_SPACING_MM = 0.01
"""Lower limit of spacings; smaller values are treated as typos."""

HIGHEST_ORDER = 5
"""Highest spline order of `scipy.ndimage`."""

SCALED_DTYPES = ("uint8", "uint16")
"""Output types whose range is scaled to the window, so that a window is required."""

LARGEST_NUMBER = 1e6
NARROWEST_WINDOW_HU = 1e-3
"""Limits within which float32 arithmetic remains accurate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of the conversion of a stacked series to a training-ready volume.

    The fields are applied in this order. A field that is switched off is None in Python and "none" in TOML and on the
    command line.

    Raises
    ------
    RecipeError
        If a value is out of range, or two values contradict each other.

    Examples
    --------
    >>> recipe = gpuprep.Recipe(spacing_mm=(1.0, 0.8, 0.8), window_hu=None, size=None, dtype="int16")
    >>> gpuprep.Recipe.from_dict({"base": "lung", "size": 256}).window_hu
    (-1350.0, 150.0)
    >>> gpuprep.Recipe(window_hu=(400, -1000))
    Traceback (most recent call last):
        ...
    gpuprep.errors.RecipeError: window_hu = 400,-1000: the first number must be the smaller one
    """

    policy: Policy = "fix"
    """Handling of irregular series: see `Rules`, also for the next seven fields."""
    spacing_tolerance: float = _DEFAULT_RULES.spacing_tolerance
    position_tolerance_mm: float = _DEFAULT_RULES.position_tolerance_mm
    lean_tolerance_mm: float = _DEFAULT_RULES.lean_tolerance_mm
    max_missing: int = _DEFAULT_RULES.max_missing
    max_missing_share: float = _DEFAULT_RULES.max_missing_share
    assume_hu: bool = False
    group_by: GroupBy = "uid"
    orient: Orient = "native"
    """"native": axes as acquired. "LPS": axes permuted and reversed to the nearest axial orientation: slices superior,
    rows posterior, columns left; nothing is interpolated."""
    padding: Padding = "air"
    """Handling of padding. "air": declared padding and everything below −1024 HU becomes −1000 HU. "minus2000-to-0":
    the stored value −2000 becomes 0 before rescaling, as in a widely copied notebook. "keep": unchanged."""
    crop: str | None = None
    """What volumes are cropped to, in a box along the axes: "body", "lungs", "mask" (all structures of segmentations)
    or "mask:NAME,…" (some of them). None: they are not cropped."""
    crop_margin_mm: float = 10.0
    """Margin of that box on each side, in mm; it ends where the volume ends."""
    crop_missing: CropMissing = "whole"
    """Series in which that part is not found: "whole" keeps all of it, "reject" rejects it."""
    spacing_mm: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    """Target spacing of slices, rows and columns in mm; None: as acquired."""
    order: int = 3
    """Spline order of the resampling: 0 nearest, 1 linear, 3 cubic, up to 5."""
    align: Align = "edge"
    """"edge": the physical extent is kept, and the border is repeated beyond it. "corner": the defaults of
    `scipy.ndimage.zoom` (outer voxel centres are kept, 0 HU beyond) and of `skimage.transform.resize`."""
    anti_alias: AntiAlias = "none"
    """Steps that blur an axis before shrinking it, with a Gaussian of (shrink factor − 1)/2 voxels."""
    window_hu: tuple[float, float] | None = (-1000.0, 400.0)
    """Window (low, high) to which HU are clipped, then scaled to [0, 1]; None: HU are kept."""
    size: tuple[int, int] | None = (512, 512)
    """Rows and columns of each slice; None: as resampled."""
    fit: Fit = "stretch"
    """Method of reaching that size. "stretch": linear interpolation. "pad": air around the centred slice; a larger
    slice is refused. "crop": cut about the centre, with air around a smaller slice."""
    dtype: Dtype = "float32"
    """Output type. "uint8" and "uint16" scale the window to their range; "int16" holds HU, rounded and unscaled."""
    format: Format = "tif"
    """"tif": one file per slice. "tif-stack": one file that ImageJ opens as a volume. "nifti": NIfTI-1, ``.nii``, or
    ``.nii.gz`` with zlib. "zarr": OME-Zarr 0.5, chunked for patches. "npy": for ``numpy.load(mmap_mode="r")``."""
    compression: Compression = "none"
    """Lossless compression. NIfTI does not support zstd, and .npy supports none: see `ENDINGS`."""
    image: bool = True
    """Whether the image is written; False for masks alone."""
    masks: Masks = field(default_factory=Masks)
    """Conversion of segmentations to masks, a table of its own."""
    select: Select = field(default_factory=Select)
    """Choice of the series of a cohort, a table of its own. It does not affect volumes, nor the hash of the recipe."""

    def __post_init__(self) -> None:
        for name, kind in CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise RecipeError(f"{name} = {value!r}: choose one of {', '.join(get_args(kind))}")
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            whole = name == "max_missing"
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                kind_ = "a whole number" if whole else "a number"
                raise RecipeError(f"{name} = {value!r}: give {kind_} from {low:g} to {high:g}")
            object.__setattr__(self, name, value if whole else value + 0.0)  # equal recipes have equal hashes
        for name in ("assume_hu", "image"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} = {getattr(self, name)!r}: give true or false")
        if self.compression not in ENDINGS[self.format]:
            raise RecipeError(
                f"format = {self.format!r} cannot hold compression = {self.compression!r}: choose compression = "
                f"{' or '.join(ENDINGS[self.format])}, or format = "
                f"{' or '.join(f for f in ENDINGS if self.compression in ENDINGS[f])}"
            )
        if self.crop is not None and not (isinstance(self.crop, str) and re.fullmatch(CROP_PATTERN, self.crop)):
            close = _did_you_mean(self.crop, ("body", "lungs", "mask")) if isinstance(self.crop, str) else ""
            raise RecipeError(f"crop = {self.crop!r}{close}: choose body, lungs, mask, mask:NAME,… or none")
        if not isinstance(self.masks, Masks):
            raise RecipeError(f"masks = {self.masks!r}: give a table of TOML, or gpuprep.Masks")
        if not isinstance(self.select, Select):
            raise RecipeError(f"select = {self.select!r}: give a table of TOML, or gpuprep.Select")
        if not isinstance(self.order, int) or isinstance(self.order, bool) or not 0 <= self.order <= HIGHEST_ORDER:
            raise RecipeError(f"order = {self.order!r}: give a whole number from 0 (nearest) to 5; 3 is cubic")
        for name, kind, count, words in (
            ("spacing_mm", float, 3, "three positive numbers of mm, slices first, or none"),
            ("size", int, 2, "two positive whole numbers, rows first, or none"),
        ):
            value = getattr(self, name)
            if value is not None:
                value = _numbers(name, value, kind, count, words)
                if not all(SMALLEST_SPACING_MM <= v <= LARGEST_AXIS for v in value):
                    raise RecipeError(f"{name} = {value}: give {words}, each at most {LARGEST_AXIS}")
                object.__setattr__(self, name, value)
        if self.window_hu is not None:
            low, high = _numbers("window_hu", self.window_hu, float, 2, "low,high in HU, or none")
            if not high - low >= NARROWEST_WINDOW_HU:
                raise RecipeError(f"window_hu = {low:g},{high:g}: the first number must be the smaller one")
            object.__setattr__(self, "window_hu", (low, high))
        elif self.dtype in SCALED_DTYPES:
            raise RecipeError(
                f"dtype = {self.dtype!r} scales the window to its range, but window_hu is none: "
                "give a window, or choose float32 or int16 to keep HU"
            )

    @property
    def crop_kind(self) -> str | None:
        """Part to which volumes are cropped: "body", "lungs", "mask" or None."""
        return None if self.crop is None else self.crop.partition(":")[0]

    @property
    def crop_names(self) -> tuple[str, ...]:
        """Structures to which volumes are cropped; empty: all of them."""
        names = (self.crop or "").partition(":")[2]
        return tuple(name.strip() for name in names.split(",")) if names else ()

    @property
    def ending(self) -> str:
        """Suffix of the file name of each volume; "" for a folder of slices."""
        return ENDINGS[self.format][self.compression]

    def check_installed(self) -> None:
        """Check that the packages for this format are installed.

        Raises
        ------
        RecipeError
            If a package is absent or too old; the text says what to install.
        """
        for package, least in REQUIRED_PACKAGES.get(self.format, ()):
            try:
                found = version(package)
            except PackageNotFoundError:
                found = ""
            if not found or int(found.split(".")[0]) < least:
                raise RecipeError(
                    f"format = {self.format!r} needs {package} {least} or later, and there is {found or 'none'}: "
                    f"pip install 'gpuprep[{self.format}]'"
                )

    @property
    def advice(self) -> str:
        """Advice on an allowed but unusual combination of values; "" if there is none."""
        if (self.format, self.compression) == ("tif-stack", "zstd"):
            return "ImageJ cannot open a TIFF compressed with zstd: use --compression zlib or none"
        return ""

    @property
    def rules(self) -> Rules:
        """Rules for stacking."""
        rules = Rules(**{f.name: getattr(self, f.name) for f in fields(Rules)})
        return rules if self.image else replace(rules, assume_hu=True)  # masks do not depend on HU

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """Return the recipe of a preset.

        Raises
        ------
        RecipeError
            If the name is not one of `PRESETS`.
        """
        if name not in PRESETS:
            raise RecipeError(f"there is no recipe {name!r}{_did_you_mean(name, PRESETS)}: {', '.join(PRESETS)}")
        return PRESETS[name].recipe

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe of a TOML table; the preset ``base`` ("default" if absent) provides the other fields."""
        values = dict(values)
        base = cls.preset(str(values.pop("base", "default")))
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise RecipeError(
                    f"a recipe has no {key!r}{_did_you_mean(key, known)}; its keys: base, {', '.join(known)}"
                )
        if isinstance(values.get("spacing_mm"), int | float):
            values["spacing_mm"] = [values["spacing_mm"]] * 3
        if isinstance(values.get("size"), int):
            values["size"] = [values["size"]] * 2
        changes: dict[str, Any] = {k: None if k in OPTIONAL and v == "none" else v for k, v in values.items()}
        if "masks" in changes:
            changes["masks"] = Masks.from_dict(changes["masks"], base.masks)
        if "select" in changes:
            changes["select"] = Select.from_dict(changes["select"], base.select)
        return replace(base, **changes)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Return the recipe of a TOML file.

        Raises
        ------
        RecipeError
            If the file cannot be read, is not TOML, or holds an invalid recipe.
        """
        try:
            return cls.from_dict(tomllib.loads(Path(path).read_text("utf-8")))
        except OSError as exc:
            raise RecipeError(f"cannot read the recipe {path}: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise RecipeError(f"{path} is not TOML: {exc}") from exc
        except RecipeError as exc:
            raise RecipeError(f"{path}: {exc}") from exc

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a table for TOML and JSON."""
        plain = {k: "none" if v is None else v for k, v in asdict(self).items()}
        tables = {"masks": self.masks.to_dict(), "select": self.select.to_dict()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()} | tables

    def to_toml(self) -> str:
        """Return the recipe as TOML, from which `from_dict` makes an equal recipe."""
        return tomli_w.dumps(self.to_dict())

    @property
    def sha256(self) -> str:
        """SHA-256 of all fields that affect volumes, equal for recipes that make equal ones."""
        fields_ = {k: v for k, v in self.to_dict().items() if k != "select"}
        del fields_["masks"]["codes"]  # only in DICOM SEG that is made of volumes
        if self.crop is None:
            del fields_["crop_margin_mm"], fields_["crop_missing"]
        return hashlib.sha256(json.dumps(fields_, sort_keys=True).encode()).hexdigest()


CROP_PATTERN = r"body|lungs|mask(:[^,]*[^,\s][^,]*(,[^,]*[^,\s][^,]*)*)?"
"""Values of `Recipe.crop`."""

LIMITS = {
    "crop_margin_mm": (0, 1000),
    "spacing_tolerance": (0, 1),
    "position_tolerance_mm": (1e-6, 10),
    "lean_tolerance_mm": (1e-6, 1000),
    "max_missing": (0, 1000),
    "max_missing_share": (0, 1),
}
"""Lowest and highest value by numeric field."""

OPTIONAL = ("crop", "spacing_mm", "window_hu", "size")
"""Fields that may be "none"."""

CHOICES: dict[str, Any] = {
    "policy": Policy,
    "group_by": GroupBy,
    "orient": Orient,
    "padding": Padding,
    "crop_missing": CropMissing,
    "align": Align,
    "anti_alias": AntiAlias,
    "fit": Fit,
    "dtype": Dtype,
    "format": Format,
    "compression": Compression,
}
"""Type with the allowed values by field."""


def _numbers(name: str, value: Any, kind: type, count: int, words: str) -> tuple[Any, ...]:
    """Return `value` as a tuple of `count` finite numbers of `kind`; raise a RecipeError if it is not one."""
    ok = isinstance(value, list | tuple) and len(value) == count
    if not ok or any(isinstance(v, bool) or not isinstance(v, int | kind) for v in value):
        raise RecipeError(f"{name} = {value!r}: give {words}")
    if not all(abs(v) <= LARGEST_NUMBER for v in value):  # False for NaN
        raise RecipeError(f"{name} = {value!r}: give {words}")
    return tuple(kind(v) + kind(0) for v in value)  # + 0 turns −0 into 0, so that equal recipes have equal hashes


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named recipe."""

    recipe: Recipe
    why: str
    """Purpose in one line."""
    source: str
    """Source of its numbers."""

    def to_toml(self) -> str:
        """Return the recipe as TOML, with its purpose and source as comments."""
        return f"# {self.why}\n# Source: {self.source}\n\n{self.recipe.to_toml()}"


_WINDOWS = "A. Murphy et al., Windowing (CT), radiopaedia.org/articles/52108"

PRESETS: dict[str, Preset] = {
    "default": Preset(
        Recipe(),
        "1 mm, from air to dense bone, slices of 512 × 512: for most networks",
        "the design of gpuprep; each step is explained in docs/usage.md",
    ),
    "classic": Preset(
        Recipe(padding="minus2000-to-0", align="corner", anti_alias="resize"),
        "the values of a widely copied notebook, to continue older data sets",
        "the defaults of scipy.ndimage.zoom and skimage.transform.resize",
    ),
    "lung": Preset(
        Recipe(window_hu=(-1350.0, 150.0)),
        "the window for lungs: width 1500 HU, level −600 HU",
        _WINDOWS,
    ),
    "soft-tissue": Preset(
        Recipe(window_hu=(-150.0, 250.0)),
        "the window for soft tissue of the abdomen: width 400 HU, level 50 HU",
        _WINDOWS,
    ),
    "bone": Preset(
        Recipe(window_hu=(-500.0, 1300.0)),
        "the window for bone of the spine: width 1800 HU, level 400 HU",
        _WINDOWS,
    ),
    "luna16": Preset(
        Recipe(window_hu=(-1200.0, 600.0), size=None, dtype="uint8"),
        "lung nodules: 1 mm, [−1200, 600] HU to 0…255, without the mask of lungs",
        "F. Liao et al., IEEE TNNLS 30(11):3484–3495, 2019, doi:10.1109/TNNLS.2019.2892409",
    ),
    "luna16-lungs": Preset(
        Recipe(window_hu=(-1200.0, 600.0), crop="lungs", size=None, dtype="uint8"),
        "lung nodules as luna16, cropped to the lungs with a margin of 10 mm",
        "F. Liao et al., IEEE TNNLS 30(11):3484–3495, 2019, doi:10.1109/TNNLS.2019.2892409",
    ),
    "body": Preset(
        Recipe(crop="body", size=None),
        "1 mm, cropped to the body: without table and air around",
        "the design of gpuprep; docs/crop.md explains how the body is found",
    ),
    "nnunet-ct": Preset(
        Recipe(spacing_mm=None, window_hu=None, size=None, dtype="int16", format="nifti", compression="zlib"),
        "HU as scanned: nnU-Net resamples and normalises by statistics of the cohort",
        "F. Isensee et al., Nature Methods 18:203–211, 2021, doi:10.1038/s41592-020-01008-z",
    ),
}
"""Presets by name."""
