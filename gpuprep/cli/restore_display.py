"""Prints the progress and the results of a folder of predictions."""

from __future__ import annotations

from gpuprep.cli.console import CountingBar, print_line
from gpuprep.core.formatting import format_count, printable
from gpuprep.output.restore_record import RestoredRow
from gpuprep.pipeline.restore_cohort import RestoredCohort


class RestoreBar(CountingBar):
    """Progress display for predictions; it also prints a line for each one that is not restored."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__("predictions", hidden=hidden)

    def finished(self, row: RestoredRow) -> None:
        """Count a prediction."""
        self.one_more()
        if row.verdict in ("unmatched", "failed"):
            style = "yellow" if row.verdict == "unmatched" else "red"
            text = f"{row.verdict:9}  {printable(row.prediction)}: {row.reason}"
            self._console.print(text, style=style, soft_wrap=True)


def show_restored(cohort: RestoredCohort, results: str, labels: str | None) -> None:
    """Print notes about results, the file with the names of labels, and the number of predictions by verdict."""
    for row in cohort.rows:
        if row.notes and row.verdict == "restored":
            print_line(f"{row.result}: {row.notes}")
    if labels is not None:
        print_line(f"labels have the names in {labels}")
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(cohort.counts.items()))
    without = f"; {cohort.without_prediction} series without a prediction" if cohort.without_prediction else ""
    print_line(f"{format_count(len(cohort.rows), 'prediction')}: {counts or 'none'}{without}; results in {results}")
