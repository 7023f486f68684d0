"""Pairs the contenders of gpuprep: with this build, and with the build of another commit."""

from __future__ import annotations

from dataclasses import replace

from bench.compare.builds import Build
from bench.compare.contenders import FLOORS, Contender, contenders

COMMAND_LINE = Contender(name="gpuprep, command line, 1 series", module="command_line", dtype="float32", series=1)

USUAL = (*(f"gpuprep, {name}" for name in FLOORS), COMMAND_LINE.name)
"""Names of the contenders that are paired if none are named."""

ROUNDS = 5


def pairs(builds: tuple[Build, Build], cores: int, gpu: bool) -> list[Contender]:
    """Return each contender of gpuprep with this build, followed by the same with the other build.

    `Contender.against` of both is the name with this build.
    """
    return [
        replace(
            contender,
            name=contender.name if build is builds[0] else f"{contender.name}, {build.name}",
            module=COMMAND_LINE.module if contender.module == COMMAND_LINE.module else "with_any_build",
            environment={**contender.environment, **build.environment},
            root=build.root,
            against=contender.name,
            claim=None,
            floor=None,
            rounds=ROUNDS,
        )
        for pair in zip(*([*_ours(b, cores, gpu), COMMAND_LINE] for b in builds), strict=True)
        for contender, build in zip(pair, builds, strict=True)
    ]


def _ours(build: Build, cores: int, gpu: bool) -> list[Contender]:
    return [c for c in contenders(cores, gpu, build.caches) if c.ours]
