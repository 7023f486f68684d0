"""Locks an output folder in an object store for one run, with a note of who holds the lock."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpuprep.core.shard import WHOLE_COHORT, Shard
from gpuprep.errors import OutputError, RequestError
from gpuprep.files import filesystem
from gpuprep.output.paths import WORK_FOLDER
from gpuprep.output.records import now, this_host

LEASE_S = 900.0
"""Seconds without renewal after which a lock counts as abandoned."""


class BucketLock:
    """Lock object in the store: host, process ID and the times of its start and last renewal.

    A lock is ignored if it is no longer renewed, or if its process is known to be dead. A run first writes its own
    lock, on condition that there is none, and then reads the locks of other runs. So of two runs that begin at the same
    time, at least one sees the other and stops.
    """

    def __init__(self, url: str, shard: Shard) -> None:
        self._out = url
        self._shard = shard
        self.url = lock_url(url, shard)
        self._content = {
            "host": this_host(),
            "pid": os.getpid(),
            "home": process_namespace(),
            "since": now(),
            "token": uuid.uuid4().hex,
        }

    def acquire(self) -> None:
        """Acquire the lock.

        Raises
        ------
        RequestError
            If another run holds this lock, or one that excludes it.
        OSError
            If the store cannot be written.
        """
        former = read_lock(self.url)
        if is_held(former):  # checked here too, because some stores ignore conditions
            raise RequestError(self._held_message(self.url, former))
        if former is not None:
            filesystem.remove(self.url)
        with suppress(OSError):
            self._write(new=True)
        stored = read_lock(self.url)
        if stored is None:  # the store has no conditional writes, or cannot be written; the latter raises here
            self._write()
            stored = read_lock(self.url)
        if not self._is_ours(stored):
            raise RequestError(self._held_message(self.url, stored))
        for url in self._excluding_locks():
            if is_held(other := read_lock(url)):
                self.release()
                raise RequestError(self._held_message(url, other))

    def renew(self) -> None:
        """Update the time of the last renewal.

        Raises
        ------
        OutputError
            If another run has taken the lock over, and may have written since, or if the lock was removed.
        """
        if not self._is_ours(read_lock(self.url)):
            raise OutputError(
                f"{self._out} was taken over by another run, or its lock was removed: the manifest of this run is not "
                "uploaded; the next run recognises complete volumes"
            )
        self._write()

    def release(self) -> None:
        """Remove the lock, if it is still ours."""
        with suppress(OSError):
            if self._is_ours(read_lock(self.url)):
                filesystem.remove(self.url)

    def _write(self, *, new: bool = False) -> None:
        filesystem.write_bytes(self.url, json.dumps(self._content | {"renewed": now()}).encode(), new=new)

    def _is_ours(self, lock: dict[str, Any] | None) -> bool:
        return lock is not None and lock.get("token") == self._content["token"]

    def _excluding_locks(self) -> list[str]:
        """Return the URLs of other locks that exclude this one: only runs of different shards may go on together."""
        if self._shard != WHOLE_COHORT:
            return [lock_url(self._out, WHOLE_COHORT)]
        found = filesystem.walk(f"{self._out}/{WORK_FOLDER}")
        return [path for _, files in found for path, _ in files if path.endswith("/lock") and path != self.url]

    def _held_message(self, url: str, lock: dict[str, Any] | None) -> str:
        holder = lock or {}
        return (
            f"another gpuprep is writing into {self._out}: process {holder.get('pid')} on {holder.get('host')}, since "
            f"{holder.get('since')}, lock last renewed at {holder.get('renewed')}. Wait for it, or choose another "
            f"--out; if it was killed, remove {url}, or wait until {LEASE_S / 60:.0f} minutes after the last renewal"
        )


def lock_url(url: str, shard: Shard) -> str:
    """Return the URL of the lock of an output folder, or of a shard of it."""
    return "/".join(part for part in (url, WORK_FOLDER, shard.name, "lock") if part)


def read_lock(url: str) -> dict[str, Any] | None:
    """Return the content of a lock; None if there is no lock, {} if its content is no JSON object."""
    try:
        lock = json.loads(filesystem.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValueError:
        lock = None
    return lock if isinstance(lock, dict) else {}


def is_held(lock: dict[str, Any] | None) -> bool:
    """Return whether a lock was renewed within `LEASE_S` by a process that is not known to be dead."""
    try:
        if (lock or {}).get("home") == process_namespace() != "":
            os.kill((lock or {})["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, KeyError, TypeError):  # another user's process, or a damaged lock
        pass
    try:
        renewed = datetime.fromisoformat((lock or {})["renewed"])
        return (datetime.now(UTC) - renewed).total_seconds() < LEASE_S
    except (KeyError, ValueError, TypeError):
        return False


def process_namespace() -> str:
    """Return the boot ID and PID namespace in which a process ID is unique; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
