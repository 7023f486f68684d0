"""Makes the recipe and the options of a run from the flags of a command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuprep.cli.exit_codes import header_index
from gpuprep.cli.options import MASK_FLAGS, OUTPUT_FLAGS, RECIPE_FLAGS, SELECT_FLAGS, STACKING_FLAGS
from gpuprep.errors import RecipeError, RequestError
from gpuprep.executors.signals import signals_blocked

if TYPE_CHECKING:
    from gpuprep.core.recipe import Recipe
    from gpuprep.pipeline.options import ConvertOptions
    from gpuprep.pipeline.pseudonyms import Pseudonyms


def recipe_from_flags(name: str, flags: Mapping[str, Any], **more: Any) -> Recipe:
    """Return a recipe by its name or file, changed by the flags that were given and by the fields in `more`."""
    with signals_blocked():
        from gpuprep.core.recipe import PRESETS, Recipe

    base = (
        Recipe.load(name)
        if name not in PRESETS and (name.endswith(".toml") or os.path.exists(name))
        else Recipe.preset(name)
    )
    known = base.to_dict()
    given = {k: _parsed(k, flags[k]) for k in (*RECIPE_FLAGS, *STACKING_FLAGS) if flags.get(k) is not None}
    masks = {k.removeprefix("mask_"): flags[k] for k in MASK_FLAGS if flags.get(k) is not None}
    choice = {k.removeprefix("select_"): flags[k] for k in SELECT_FLAGS if flags.get(k) is not None}
    if choice.get("best_per") == "none":
        choice.setdefault("prefer", "none")  # which has no meaning without
    recipe = Recipe.from_dict(
        known | given | more | {"masks": known["masks"] | masks, "select": known["select"] | choice}
    )
    if recipe.crop is None and {"crop_margin_mm", "crop_missing"} & given.keys():
        raise RecipeError("--margin or --crop-missing without crop: give --crop body, lungs or mask")
    return recipe


def options_from_flags(flags: Mapping[str, Any], out: str | None, **more: Any) -> ConvertOptions:
    """Return the options of a run: the flags that were given, and the fields in `more`, which take precedence."""
    with signals_blocked():
        from gpuprep.pipeline.options import ConvertOptions

    given = {f.name: flags[f.name] for f in fields(ConvertOptions) if flags.get(f.name) is not None}
    given["jobs"] = jobs_or_cores(flags["jobs"], flags["backend"])
    given["index"] = header_index(flags["index"])
    if "gpus" in given:
        given["gpus"] = _gpu_numbers(given["gpus"])
    if "shard" in given:
        given["shard"] = _shard(given["shard"])
    if "names" in given:
        given["names"] = _pseudonyms(given["names"], flags["key"], out or "")
    if flags.get("no_room_check"):
        given["room_check"] = False
    return ConvertOptions(**given | more)


def display_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags in `OUTPUT_FLAGS` that a command takes."""
    return {name: flags[name] for name in OUTPUT_FLAGS if name in flags}


def jobs_or_cores(jobs: int | None, backend: str) -> int | None:
    """Return `jobs`, or by default the number of usable cores; on a GPU, None: the executor decides."""
    from gpuprep.executors.cores import usable_cores

    return jobs if jobs is not None or backend == "gpu" else usable_cores()


def _parsed(name: str, value: Any) -> Any:
    """Return the value of a flag as a recipe field: "1" and "3,1,1" become numbers, "none" stays."""
    if not isinstance(value, str) or name not in ("spacing_mm", "window_hu", "size") or value == "none":
        return value
    try:
        numbers = [int(part) if name == "size" else float(part) for part in value.split(",")]
    except ValueError:
        raise RecipeError(f"{name} = {value!r}: give numbers separated by commas, or none") from None
    return numbers[0] if len(numbers) == 1 else numbers


def _gpu_numbers(text: str) -> list[int]:
    """Return the GPU numbers in a text such as ``0,1``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--gpus {text!r}: give numbers separated by commas, such as 0,1") from None


def _shard(text: str) -> Any:
    from gpuprep.core.shard import Shard

    return Shard.parse(text)


def _pseudonyms(names: str, key: Path | None, out: str) -> Pseudonyms | None:
    """Return the pseudonyms of a run; None if names are those of the source."""
    if names == "hash" and key is None:
        raise RequestError(
            "--names hash needs --key FILE, a path outside of --out; the file is created if it does not exist"
        )
    if names != "hash" and key is not None:
        raise RequestError("--key is only for --names hash: give both or neither")
    if key is None:
        return None
    from gpuprep.pipeline.pseudonyms import Pseudonyms

    return Pseudonyms.load(key, out)
