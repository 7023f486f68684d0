"""Handles SIGINT and SIGTERM: the first requests a graceful stop, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def _do_nothing() -> None:
    pass


@dataclass(slots=True)
class Stop:
    """Stop request of a run, set by the signal handler `interrupt`."""

    on_request: Callable[[], None] = _do_nothing
    """Called at the first signal, inside the signal handler, so it must be reentrant and short."""
    asked: bool = False
    """Whether a stop was requested: tasks in flight are finished, and no more begin."""
    _in_flight: bool = False

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Enable the graceful stop during the block: there are tasks in flight to finish."""
        self._in_flight = True
        try:
            yield
        finally:
            self._in_flight = False

    def interrupt(self, *_: object) -> None:
        """Request a stop; raise KeyboardInterrupt at the second request, or if no task is in flight."""
        if self.asked or not self._in_flight:
            raise KeyboardInterrupt
        self.asked = True
        self.on_request()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM until the end of the block.

    Needed around imports, because Python discards exceptions that a signal handler raises in some of their clean-ups;
    and around the start of a worker, which inherits the blocked signals, so that only its parent handles them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
