"""Locks an output folder in an object store for one run, with a note of who holds the lock."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpuprep.core.shard import WHOLE, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files import filesystem
from gpuprep.output.paths import WORKSHOP
from gpuprep.output.records import now, this_host

LEASE_S = 900.0
"""A lock that was not renewed for so long was left behind."""


class BucketLock:
    """An object that says who is writing; one not renewed any more, or whose process is dead, counts for nothing.

    It is written first, on condition that there is none, and then those of others are looked at. So of two runs that
    begin at the same time one sees the other, or both do, and none goes on.
    """

    def __init__(self, url: str, shard: Shard) -> None:
        self._out = url
        self._shard = shard
        self.url = lock_url(url, shard)
        self._content = {
            "host": this_host(),
            "pid": os.getpid(),
            "home": home_of_run(),
            "since": now(),
            "token": uuid.uuid4().hex,
        }

    def take(self) -> None:
        """Take it.

        Raises
        ------
        RequestError
            If another run has it, or one that must not be beside this one.
        OSError
            If nothing can be written there.
        """
        former = note_at(self.url)
        if is_alive(former):  # not left to the condition, which some stores pass over
            raise RequestError(self._taken(self.url, former))
        if former is not None:
            filesystem.remove(self.url)
        with suppress(OSError):
            self._write(new=True)
        there = note_at(self.url)
        if there is None:  # the store knows no conditions, or nothing can be written at all
            self._write()
            there = note_at(self.url)
        if not self._is_ours(there):
            raise RequestError(self._taken(self.url, there))
        for url in self._rivals():
            if is_alive(other := note_at(url)):
                self.release()
                raise RequestError(self._taken(url, other))

    def renew(self) -> None:
        """Say that the run goes on.

        Raises
        ------
        OutputError
            If somebody has taken the lock away, and may have written since.
        """
        if not self._is_ours(note_at(self.url)):
            raise OutputError(
                f"{self._out} was taken over by another run, or its lock removed: the manifest of this run is not "
                "put back; volumes that are complete will be recognised"
            )
        self._write()

    def release(self) -> None:
        """Let others in."""
        with suppress(OSError):
            if self._is_ours(note_at(self.url)):
                filesystem.remove(self.url)

    def _write(self, *, new: bool = False) -> None:
        filesystem.write_bytes(self.url, json.dumps(self._content | {"renewed": now()}).encode(), new=new)

    def _is_ours(self, note: dict[str, Any] | None) -> bool:
        return note is not None and note.get("token") == self._content["token"]

    def _rivals(self) -> list[str]:
        """Return the locks that must not be held beside this one: shards go together, and nothing else does."""
        if self._shard != WHOLE:
            return [lock_url(self._out, WHOLE)]
        found = filesystem.walk(f"{self._out}/{WORKSHOP}")
        return [path for _, files in found for path, _ in files if path.endswith("/lock") and path != self.url]

    def _taken(self, url: str, note: dict[str, Any] | None) -> str:
        said = note or {}
        return (
            f"another gpuprep is writing into {self._out}: process {said.get('pid')} on {said.get('host')}, since "
            f"{said.get('since')}, last heard of at {said.get('renewed')}. Wait for it, or choose another --out; if it "
            f"was killed, remove {url}, or wait {LEASE_S / 60:.0f} minutes from then"
        )


def lock_url(url: str, shard: Shard) -> str:
    """Return the URL of the lock of an output folder, or of a shard of it."""
    return "/".join(part for part in (url, WORKSHOP, shard.name, "lock") if part)


def note_at(url: str) -> dict[str, Any] | None:
    """Return what a lock says; None where there is none."""
    try:
        note = json.loads(filesystem.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValueError:
        note = None
    return note if isinstance(note, dict) else {}


def is_alive(note: dict[str, Any] | None) -> bool:
    """Whether a lock has been renewed of late, by a process that is not known to be dead."""
    try:
        if (note or {}).get("home") == home_of_run() != "":
            os.kill((note or {})["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, KeyError, TypeError):  # not ours to ask about
        pass
    try:
        renewed = datetime.fromisoformat((note or {})["renewed"])
        return (datetime.now(UTC) - renewed).total_seconds() < LEASE_S
    except (KeyError, ValueError, TypeError):
        return False


def home_of_run() -> str:
    """Return where a process number means the same: one start of a machine, and a container; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
