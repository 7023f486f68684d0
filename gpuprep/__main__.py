"""Starts the command line: the console script, and ``python -m gpuprep``."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec


def main() -> None:
    """Run the command line."""
    if _will_convert_on_cpu(sys.argv[1:]):
        # The modules of workers and those of the command line take about as long, so they are imported side by side.
        from gpuprep.executors.fork_server import LOOP_MODULES, kill_fork_server, start_fork_server

        start_fork_server(LOOP_MODULES)
        atexit.register(kill_fork_server)
    from gpuprep.cli import app

    app.main()


def _will_convert_on_cpu(words: Sequence[str]) -> bool:
    """Whether a command line, not parsed yet, most likely converts series in worker processes without a GPU.

    If it does not, the fork server does some work in vain; if it does although this is False, it starts later.
    """
    if words[:1] not in (["convert"], ["mask"]) or {"--help", "--dry-run", "--scheduler"}.intersection(words):
        return False
    # An output folder with a manifest may be complete.
    return find_spec("cupy") is None and not any(os.path.exists(f"{word}/manifest.sqlite") for word in words)


if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python has put the current folder first, which may hold a zarr.py. Workers get this path.
        sys.path.append(sys.path.pop(0))
    main()
