"""Defines the commands that only look: `recipes`, and `show` for one series."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuprep.cli.exit_codes import errors_to_exit_codes, print_json
from gpuprep.cli.options import STACKING_FLAGS, preset_names, some, takes
from gpuprep.errors import RequestError
from gpuprep.executors.signals import held_back


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Print this one as TOML.", autocompletion=preset_names),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipe files.")] = False,
) -> None:
    """List recipes that have names; print one, to start a file from; or the schema by which editors check files."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import show_presets
            from gpuprep.core.recipe import PRESETS, Recipe
            from gpuprep.core.recipe_schema import recipe_schema

        if schema and name is not None:
            raise RequestError("--schema is that of every recipe: give it alone, or a name")
        if schema:
            print_json(recipe_schema())
        elif name is None:
            show_presets(PRESETS)
        else:
            Recipe.preset(name)
            sys.stdout.write(PRESETS[name].to_toml())


@takes(some(STACKING_FLAGS, "group_by"))
def show(
    series: Annotated[
        str, typer.Argument(metavar="SERIES", help="DICOM of one series, or the folder of a finished output.")
    ],
    series_uid: Annotated[str | None, typer.Option(metavar="UID", help="This one, where there are several.")] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a montage of slices and the histogram, as PNG.")
    ] = None,
    **flags: Any,
) -> None:
    """Look at one series: verdict, grid, HU, a histogram with the bands of tissues, and three planes."""
    with errors_to_exit_codes():
        with held_back():
            from gpuprep.cli.console import say, show_glance
            from gpuprep.report.inspect_series import glance
            from gpuprep.report.montage import montage

        seen = glance(series, series_uid, flags["group_by"] or "uid")
        show_glance(seen)
        if png is not None:
            try:
                montage(seen).save(png, "PNG", optimize=True)
            except OSError as exc:
                raise RequestError(f"cannot write {png}: {exc.strerror}") from exc
            say(f"{png} has {len(seen.slices)} slices and the histogram")
        raise typer.Exit(1 if seen.verdict == "rejected" else 0)


LOOKING: tuple[Callable[..., None], ...] = (recipes, show)
