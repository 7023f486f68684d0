"""Chooses the series of a cohort that are converted, and says of each other one why it is left out.

A series is left out by the first of these that applies: the file of ``--select``, the condition of ``--where``, equal
pixels in another series, and a better series of its group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from gpuprep.core.select_options import BestPer
from gpuprep.core.series import Series
from gpuprep.dicom.audit import Audit, audit
from gpuprep.dicom.copies import digest_of_some_slices
from gpuprep.dicom.discover import Cohort
from gpuprep.errors import RequestError
from gpuprep.executors.processes import Executor, WorkerDiedError
from gpuprep.output.columns import FREE_TEXT
from gpuprep.output.records import SeriesFacts
from gpuprep.pipeline.judge import judge
from gpuprep.pipeline.match_masks import Matched
from gpuprep.pipeline.options import ConvertOptions
from gpuprep.pipeline.selection_file import OutputName, SelectionFile
from gpuprep.pipeline.series_facts import Relation, facts_of, known_row, relations
from gpuprep.pipeline.series_query import PREFER, WHERE, SeriesTable


class LeftOut(NamedTuple):
    """Why a series is not converted."""

    code: str
    """``select``, ``where``, ``duplicate-series`` or ``best-per``."""
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The choice among the series of a cohort; without options, all of them."""

    relations: Mapping[str, Relation]
    """Relations of each series, by key."""
    duplicates: Mapping[str, str] = field(default_factory=dict)
    """Key of the series of which a series is a copy, by its own key; only where duplicates are left out."""
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    """Series that are not converted, by key."""
    names: Mapping[str, OutputName] = field(default_factory=dict)
    """Names of outputs that the file of ``--select`` gives, by key."""
    complaint: str = ""
    """Phrase about lines of that file without a series; "" if there are none."""

    def facts(self, series: Series, audited: Audit) -> SeriesFacts:
        """Return what is known of a series."""
        return facts_of(series, audited.measures, self.relations[series.key], self.duplicates.get(series.key))


def choose(cohort: Cohort, options: ConvertOptions, matches: Matched | None, executor: Executor) -> Choice:
    """Return the choice among the series of a cohort.

    Parameters
    ----------
    cohort : Cohort
        All series, also if a run converts a part of them.
    options : ConvertOptions
        The recipe with its table `Select`, and the file that lists series.
    matches : Matched, optional
        Segmentations of each series; one that cannot be read rejects its series.
    executor : Executor
        Reads pixels of series that may be copies.

    Raises
    ------
    RequestError
        If an expression or the file of the selection is invalid.
    """
    select, file = options.recipe.select, options.select
    choice = Choice(relations(cohort))
    if isinstance(file, SelectionFile):
        names, complaint = file.chosen(cohort)
        if options.names is not None and any(map(any, names.values())):
            raise RequestError(f"--select {file.path} names outputs, and so does --names hash: choose one of them")
        choice = replace(choice, names=names, complaint=complaint)
    elif not select.is_choice:
        return choice
    rows = _rows(cohort, options, matches, choice)
    left: dict[str, LeftOut] = {}
    if isinstance(file, SelectionFile):
        left = {key: LeftOut("select", f"select: it is not in {file.path}") for key in rows if key not in choice.names}
    copies: list[list[str]] = []
    if select.drop_duplicates:
        sound = {key for key, row in rows.items() if key not in left and row["verdict"] != "rejected"}
        copies = _copies([s for s in cohort if s.key in sound], executor)
    duplicates = {key: original for original, *others in copies for key in others}
    for key, original in duplicates.items():
        rows[key]["duplicate_of"] = original
    with closing(SeriesTable(rows.values())) as table:
        if select.where is not None:
            left = _by_condition(table, select.where, rows) | left
        for keys in copies:
            remaining = [key for key in keys if key not in left]
            for key in remaining[1:]:
                duplicates[key] = remaining[0]
                words = f"its pixels equal those of {remaining[0]}"
                left[key] = LeftOut("duplicate-series", f"duplicate-series: {words}")
        if select.best_per is not None:
            table.keep(key for key in rows if key not in left)
            for key, best in table.worse_ones(select.prefer or "1", PREFER):
                better = f"{_short(rows[best])} of the same {select.best_per.replace('-', ' ')} was preferred"
                left[key] = LeftOut("best-per", f"best-per: {_short(rows[key])}: {better}")
    return replace(choice, duplicates=duplicates, left_out=left)


def _rows(
    cohort: Cohort, options: ConvertOptions, matches: Matched | None, choice: Choice
) -> dict[str, dict[str, Any]]:
    """Return the row of each series among which is chosen, by key: for masks alone, those with segmentations."""
    rows = {}
    for series in cohort:
        found = matches.by_key.get(series.key, ()) if matches is not None else ()
        if not found and not options.recipe.image:
            continue
        audited = audit(series, options.recipe.rules)
        _, reason, code = judge(audited, options.recipe, found)
        verdict, codes = "rejected" if reason else audited.verdict, (code,) if code else audited.codes
        row = known_row(series, choice.facts(series, audited), verdict, codes)
        rows[series.key] = row | {"group": _group(series, options.recipe.select.best_per)}
    return rows


def _group(series: Series, best_per: BestPer | None) -> str | None:
    """Return the group of a series; None if it is unknown, so that the series is not compared with others."""
    if best_per == "patient":
        return series.patient or series.study_uid or None
    return (series.study_uid if best_per == "study" else series.frame_of_reference_uid) or None


def _by_condition(table: SeriesTable, where: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, LeftOut]:
    """Return the series for which the condition is not true, with the values that it read."""
    columns = table.columns_of(where, WHERE)
    left = {}
    for key, true in table.values(where, WHERE):
        if not true:
            values = ", ".join(_value(name, rows[key][name]) for name in columns)
            unknown = " (so the condition is unknown)" if true is None else ""
            left[key] = LeftOut("where", f"where: {values or 'the condition is false'}{unknown}")
    return left


def _value(name: str, value: object) -> str:
    """Return a column and its value as text; of free text only the column, since the text may go into OUT."""
    if value is None:
        return f"{name} is not known"
    if name in FREE_TEXT:
        return f"{name} does not fit"
    return f"{name} is {value:.6g}" if isinstance(value, float) else f"{name} is {value}"


def _short(row: Mapping[str, Any]) -> str:
    """Return a few words about a series: "1.25 mm B30f, series 4"."""
    thickness = row["slice_thickness_mm"] or row["slice_spacing_mm"]
    words = [f"{thickness:g} mm" if thickness else "", row["kernel"] or ""]
    number = f"series {row['series_number']}" if row["series_number"] is not None else f"{row['slices']} slices"
    rejected = "rejected" if row["verdict"] == "rejected" else ""
    return ", ".join(word for word in (" ".join(word for word in words if word), number, rejected) if word)


def _copies(series: Sequence[Series], executor: Executor) -> list[list[str]]:
    """Return the keys of series with equal pixels, a list for each set of them, in the order of the series."""
    alike: dict[tuple[object, ...], list[Series]] = defaultdict(list)
    for s in series:
        positions = sorted(position for header in s.slices if (position := header.position_mm) is not None)
        ends = [tuple(round(x, 2) for x in position) for position in (positions[0], positions[-1])]
        alike[(s.rows, s.columns, len(s.slices), *ends)].append(s)
    tasks = [s for several in alike.values() if len(several) > 1 for s in several]
    digests: dict[str, str] = {
        task.key: "" if isinstance(outcome, WorkerDiedError) else outcome
        for task, outcome in executor.run(digest_of_some_slices, tasks)
    }
    equal: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for place, several in alike.items():
        for s in several:
            if digest := digests.get(s.key):
                equal[*place, digest].append(s.key)
    return [keys for keys in equal.values() if len(keys) > 1]
