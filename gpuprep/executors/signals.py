"""Handles Ctrl-C and SIGTERM: once finishes what is in flight, twice stops now."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def _say_nothing() -> None:
    pass


@dataclass(slots=True)
class Stop:
    """A wish to stop that somebody may utter during a run: `interrupt` is a signal handler for it."""

    told: Callable[[], None] = _say_nothing
    """Called when the wish is heard; within a signal handler, so it may not do much."""
    asked: bool = False
    """Whether the run should finish what is in flight, and begin nothing more."""
    _in_flight: bool = False

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Tell that there is something to finish, as long as the block lasts."""
        self._in_flight = True
        try:
            yield
        finally:
            self._in_flight = False

    def interrupt(self, *_: object) -> None:
        """Wish to stop; raise KeyboardInterrupt if that was wished before, or nothing is in flight."""
        if self.asked or not self._in_flight:
            raise KeyboardInterrupt
        self.asked = True
        self.told()


@contextmanager
def held_back() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block is over.

    Around imports, because Python drops what a signal raises in the middle of some of their clean-ups; and around the
    start of a process, which inherits the state and so never hears what is its parent's to handle.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
