"""Any build of gpuprep: converts a whole cohort by those functions that earlier builds have too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpuprep


def convert_all(
    folders: list[Path],
    out: Path,
    *,
    recipe: dict[str, Any],
    engine: Any = "operators",
    gpu: bool = False,
    jobs: int | None = None,
    index: str | None = None,
) -> None:
    run = gpuprep.convert(
        folders,
        out,
        gpuprep.Recipe.from_dict(recipe),
        backend="gpu" if gpu else "cpu",
        engine=engine,
        jobs=jobs,
        index=index,
    )
    if run.exit_code != 0:
        raise RuntimeError(f"the run ended with exit code {run.exit_code}")
