"""Defines the commands that only read: `recipes`, and `show` for one series."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gpuprep.cli.exit_codes import errors_to_exit_codes, print_json
from gpuprep.cli.options import STACKING_FLAGS, add_flags, preset_names, select
from gpuprep.errors import RequestError
from gpuprep.executors.signals import signals_blocked


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Print this recipe as TOML.", autocompletion=preset_names),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipe files.")] = False,
) -> None:
    """List the named recipes, print one as the start of a recipe file, or print the JSON Schema for editors."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import show_presets
            from gpuprep.core.recipe import PRESETS, Recipe
            from gpuprep.core.recipe_schema import recipe_schema

        if schema and name is not None:
            raise RequestError("--schema is the same for all recipes: give either --schema or a name")
        if schema:
            print_json(recipe_schema())
        elif name is None:
            show_presets(PRESETS)
        else:
            Recipe.preset(name)
            sys.stdout.write(PRESETS[name].to_toml())


@add_flags(select(STACKING_FLAGS, "group_by"))
def show(
    series: Annotated[
        str, typer.Argument(metavar="SERIES", help="DICOM files of one series, or the folder of a finished output.")
    ],
    series_uid: Annotated[
        str | None, typer.Option(metavar="UID", help="Series Instance UID of the series, if there are several.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a montage of slices and the histogram to a PNG file.")
    ] = None,
    **flags: Any,
) -> None:
    """Show one series: verdict, grid, HU range, a histogram with bands of tissues, and three planes."""
    with errors_to_exit_codes():
        with signals_blocked():
            from gpuprep.cli.console import print_line, show_series_summary
            from gpuprep.report.inspect_series import summarise_series
            from gpuprep.report.montage import montage

        seen = summarise_series(series, series_uid, flags["group_by"] or "uid")
        show_series_summary(seen)
        if png is not None:
            try:
                montage(seen).save(png, "PNG", optimize=True)
            except OSError as exc:
                raise RequestError(f"cannot write {png}: {exc.strerror}") from exc
            print_line(f"{png} has {len(seen.slices)} slices and the histogram")
        raise typer.Exit(1 if seen.verdict == "rejected" else 0)


INSPECT_COMMANDS: tuple[Callable[..., None], ...] = (recipes, show)
