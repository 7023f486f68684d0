"""Runs contenders in turn: peak memory and agreement with the reference first, then times."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.compare import agreement, cohort
from bench.compare.contenders import Contender
from bench.compare.driver import Driver
from bench.compare.summary import without_paths
from bench.measure import MemoryWatch

ORDERS = {"cubic": 3, "linear": 1}
"""Spline orders of the reference, by claim."""

SETTLE_S = 1.0
"""Pause after outputs are emptied, so that the disk has freed the space before the next output is timed."""


class Comparison:
    """One comparison: the cohort, a scratch folder, and a record per contender."""

    def __init__(self, folders: list[Path], scratch: Path, log: Callable[[str], None]) -> None:
        self.folders = folders
        self.records: dict[str, dict[str, Any]] = {}
        self.sizes_bytes: dict[str, dict[str, list[int]]] = {}
        """Sizes of the output files of each series, by name of the floor."""
        self._out = scratch / "out"
        self._cleaned = 0
        self._log = log
        self._digests: dict[str, dict[str, str]] = {}
        """Digests of the files of this build, by name of the contender."""
        self._expected: dict[str, NDArray[np.float32]] = {}
        self._source_shape: tuple[int, ...] = ()

    def warm_up(self, contender: Contender) -> None:
        """Let a contender convert the whole cohort once, which fills its caches."""
        with Driver(contender) as driver:
            answer = driver.ask(self.folders, self._out)
        if "failed" in answer:
            raise SystemExit(f"{contender.name}: {without_paths(answer['failed'])}")
        self._log(f"warm-up of {contender.name}: {answer['seconds']:.1f} s")
        self._clean()

    def watch_and_check(self, all_: list[Contender]) -> None:
        """Run each contender once for peak memory, output sizes and agreement with the reference."""
        orders = {claim: order for claim, order in ORDERS.items() if any(c.claim == claim for c in all_)}
        if orders:
            hu, spacing_mm = agreement.hounsfield(self.folders[0])
            self._source_shape = hu.shape
        for claim, order in orders.items():
            self._expected[claim] = agreement.reference(hu, spacing_mm, order)
            self._log(f"reference, {claim}")
        for contender in sorted(all_, key=lambda c: c.module != "notebook"):  # its values are a reference
            self._watch_and_check(contender)
        self._expected.clear()

    def _watch_and_check(self, contender: Contender) -> None:
        folders = self.folders if contender.series is None else self.folders[:1]
        record: dict[str, Any] = {"status": "ok", "note": contender.note, "dtype": contender.dtype}
        self.records[contender.name] = record
        with Driver(contender) as driver:
            with MemoryWatch(driver.process) as memory:
                answer = driver.ask(folders, self._out)
            if self._stopped(contender, answer):
                return
        record["peak_bytes"] = memory.peak_bytes
        record["largest_process_bytes"] = memory.largest_process_bytes
        record["series_watched"] = len(folders)
        record |= {k: answer[k] for k in ("device", "predicted_process_bytes") if k in answer}
        outputs = {f.name: self._out / answer.get("outputs", {}).get(f.name, f.name) for f in folders}
        if contender.floor is not None and contender.floor not in self.sizes_bytes:
            self.sizes_bytes[contender.floor] = {name: cohort.file_sizes_bytes(out) for name, out in outputs.items()}
        if contender.claim is not None:
            self._check(contender, record, outputs[self.folders[0].name])
        if contender.root is not None:
            self._count_equal_files(contender, record)
        self._log(f"{contender.name}: {memory.peak_bytes / 1e6:.0f} MB" + _agreement_text(record))
        self._clean()

    def _check(self, contender: Contender, record: dict[str, Any], folder: Path) -> None:
        values = agreement.read_output(folder)
        if contender.module == "notebook":
            self._expected["classic"] = values
            return
        expected = self._expected.get(str(contender.claim))
        if expected is None:
            return
        record["tolerance_hu"] = tolerance_hu = agreement.tolerance_hu(contender.dtype)
        if values.shape != expected.shape:
            record |= {"agrees": False, "shape": values.shape}
            return
        record["largest_difference_hu"] = agreement.largest_difference_hu(values, expected)
        inside = agreement.inner(values.shape, self._source_shape, contender.border)
        record["border_left_out"] = contender.border
        record["largest_difference_inside_hu"] = agreement.largest_difference_hu(values[inside], expected[inside])
        record["agrees"] = record["largest_difference_inside_hu"] <= tolerance_hu

    def _count_equal_files(self, contender: Contender, record: dict[str, Any]) -> None:
        digests = cohort.digests(self._out)
        if contender.name == contender.against:
            self._digests[contender.name] = digests
        elif (expected := self._digests.get(contender.against)) is not None:
            record["files"] = len(expected.keys() | digests.keys())
            record["equal_files"] = len(expected.items() & digests.items())

    def time(self, all_: list[Contender], until: float) -> None:
        """Time all contenders in turns, in the reverse order in every other round.

        Repeated rounds that would end after `until` (`time.perf_counter`) are skipped.
        """
        round_s: dict[str, float] = {}
        for n in range(max(c.rounds for c in all_)):
            for contender in reversed(all_) if n % 2 else all_:
                record = self.records.setdefault(contender.name, {"status": "ok", "dtype": contender.dtype})
                late = n > 0 and time.perf_counter() + round_s.get(contender.name, 0) > until
                if n < contender.rounds and record["status"] == "ok" and not late:
                    started = time.perf_counter()
                    self._time_once(contender, record, n)
                    round_s[contender.name] = time.perf_counter() - started

    def _time_once(self, contender: Contender, record: dict[str, Any], round_: int) -> None:
        count = contender.series or len(self.folders)
        first = round_ * count % len(self.folders)
        folders = (self.folders[first:] + self.folders[:first])[:count]
        with Driver(contender) as driver:
            answer = driver.ask(self.folders[:1], self._out)
            cold_s = time.perf_counter() - driver.started
            if self._stopped(contender, answer):
                return
            self._clean()
            cpu_before_s = driver.cpu_s()
            answer = driver.ask(folders, self._out)
            if self._stopped(contender, answer):
                return
            cpu_s = driver.cpu_s() - cpu_before_s
        run = {
            "cold_s": cold_s,
            "seconds": answer["seconds"],
            "series": len(folders),
            "cpu_s": cpu_s,
            "bytes_in": cohort.size_bytes(folders),
            "bytes_out": cohort.size_bytes([self._out]),
        }
        record.setdefault("runs", []).append(run | {k: answer[k] for k in ("split",) if k in answer})
        self._log(f"{contender.name}: {answer['seconds'] / len(folders):.3f} s/series")
        self._clean()

    def _stopped(self, contender: Contender, answer: dict[str, Any]) -> bool:
        """Return whether a contender is absent or has failed, and record the reason."""
        for status in ("absent", "failed"):
            if status in answer:
                self.records[contender.name] |= {"status": status, "reason": without_paths(answer[status])}
                self._log(f"{contender.name}: {status}: {without_paths(answer[status])}")
                self._clean()
                return True
        return False

    def _clean(self) -> None:
        """Free the disk space of the last output without slowing down the next one.

        Files are emptied and moved aside, not deleted: for a minute after many deletions ext4 creates files slowly,
        because it avoids inodes that were freed recently.
        """
        if self._out.exists():
            for folder, _, names in os.walk(self._out):
                for name in names:
                    os.truncate(os.path.join(folder, name), 0)
            self._cleaned += 1
            self._out.rename(self._out.with_name(f"spent-{self._cleaned}"))
        os.sync()
        time.sleep(SETTLE_S)


def _agreement_text(record: dict[str, Any]) -> str:
    if "agrees" not in record:
        return ""
    if "shape" in record:
        return f", another grid: {record['shape']}"
    sign = "≤" if record["agrees"] else "but not ≤"
    return f", within {record['largest_difference_inside_hu']:.2g} HU of SciPy ({sign} {record['tolerance_hu']:.2g})"
