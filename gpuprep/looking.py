"""Commands that look and change nothing: recipes and how to write them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from gpuprep.errors import RequestError
from gpuprep.flags import preset_names
from gpuprep.interruption import held_back
from gpuprep.shell import errors_to_exit_codes, print_json


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
            from gpuprep.console import show_presets
            from gpuprep.recipe import PRESETS, Recipe
            from gpuprep.schema import recipe_schema

        if schema and name is not None:
            raise RequestError("--schema is that of every recipe: give it alone, or a name")
        if schema:
            print_json(recipe_schema())
        elif name is None:
            show_presets(PRESETS)
        else:
            Recipe.preset(name)
            sys.stdout.write(PRESETS[name].to_toml())


LOOKING: tuple[Callable[..., None], ...] = (recipes,)
