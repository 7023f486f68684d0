"""Makes `import cupy` find the stand-in instead of CuPy, in this process and in those that it starts.

Child processes have `CHILD_PATH` in PYTHONPATH, whose sitecustomize module calls `install` if the environment describes
a machine. Nothing large is imported before CuPy is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulated_cuda import Machine

CHILD_PATH = Path(__file__).parent / "child_processes"
PACKAGES = frozenset({"cupy", "cupyx", "cucim", "cupy_backends"})
"""Top-level packages that are replaced."""
DEPENDENT = ("array_api_compat.cupy", "gpuprep.compute.cupy_backend")
"""Modules of other packages that hold objects of CuPy."""


class Finder(MetaPathFinder, Loader):
    """Finds the modules of the stand-in."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        from simulated_cupy import modules

        return spec_from_loader(name, self, is_package=True) if name in modules() else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        from simulated_cupy import modules

        return modules()[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the modules are complete."""


def install() -> None:
    """Replace CuPy for the rest of this process."""
    sys.meta_path.insert(0, Finder())


@contextmanager
def installed(machine: Machine) -> Iterator[None]:
    """Replace CuPy in this process, and load modules that depend on it anew."""
    from simulated_cuda import simulate

    former = _unloaded()
    install()
    finder = sys.meta_path[0]
    simulate(machine)
    try:
        yield
    finally:
        simulate(None)
        sys.meta_path.remove(finder)
        _unloaded()
        sys.modules.update(former)
        for name, module in former.items():
            _set_in_parent(name, module)


def child_environment(machine: Machine) -> Mapping[str, str]:
    """Return the environment variables with which a child process simulates a machine."""
    from simulated_cuda import VARIABLE

    path = [str(CHILD_PATH), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), VARIABLE: machine.to_json()}


def _unloaded() -> dict[str, ModuleType]:
    """Remove CuPy and the modules that depend on it from this process, and return them."""
    names = [
        name
        for name in sys.modules
        if name.partition(".")[0] in PACKAGES or any(f"{name}.".startswith(f"{other}.") for other in DEPENDENT)
    ]
    found = {name: sys.modules.pop(name) for name in names}
    for name in found:
        _set_in_parent(name, None)
    return found


def _set_in_parent(name: str, module: Any) -> None:
    parent, _, child = name.rpartition(".")
    if parent and parent in sys.modules:
        if module is None:
            sys.modules[parent].__dict__.pop(child, None)
        else:
            setattr(sys.modules[parent], child, module)
