"""The table of a study: every metric under every method."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_znorm.compare.differences import Row, compare_methods
from lightning_znorm.compare.metrics import direction, stage
from lightning_znorm.compare.numbers import fixed, signed
from lightning_znorm.compare.one_run import Outcome
from lightning_znorm.compare.prepare import Plan
from lightning_znorm.compare.results import OWN, Measurement, curves


@dataclass(frozen=True)
class Table:
    """What a study found.

    Args:
        metric: The metric that decides.
        rows: Every metric under every method, the metric that decides first.
        failures: Runs that failed, and are in no row.
        output: Folder with ``results.csv``, ``report.md`` and ``report.html``.
    """

    metric: str
    rows: tuple[Row, ...]
    failures: tuple[Outcome, ...]
    output: Path

    def row(self, method: str, metric: str | None = None) -> Row:
        """The row of a method, for the metric that decides or another.

        Raises:
            KeyError: If there is none.
        """
        metric = metric or self.metric
        for row in self.rows:
            if (row.method, row.metric) == (method, metric):
                return row
        raise KeyError(f"{metric} of {method}")

    def __str__(self) -> str:
        rows = [row for row in self.rows if row.metric == self.metric]
        width = max((len(row.method) for row in rows), default=0)
        lines = [f"{row.method:<{width}}  {_numbers(row)}  {row.verdict}".rstrip() for row in rows]
        return "\n".join([self.metric, *lines])


def make_rows(plan: Plan, measurements: Sequence[Measurement]) -> Iterator[Row]:
    """Every metric under every method: tests as they are, all else of the last epoch.

    Args:
        plan: The study.
        measurements: All that was logged by runs that are done.
    """
    for metric in _in_order(plan, {measurement.metric for measurement in measurements}):
        found = curves(measurements, metric)
        values = {
            method: {seed: curve[max(curve)] for seed, curve in found.get(method, {}).items()}
            for method in plan.study.files
        }
        yield from compare_methods(metric, values, plan.mode if metric == plan.metric else _mode(plan, metric))


def _in_order(plan: Plan, metrics: Collection[str]) -> list[str]:
    """The one that decides, other tests, validations, and then the rest; the study's own have sections of their own."""
    order = ["test", "val", "train", None]
    shown = [metric for metric in metrics if not metric.startswith(OWN) and not metric.endswith("_step")]
    return sorted(shown, key=lambda metric: (metric != plan.metric, order.index(stage(metric)), metric))


def _mode(plan: Plan, metric: str) -> str | None:
    known = dict([plan.monitor] if plan.monitor else [])
    return known.get(metric) or direction(metric)


def _numbers(row: Row) -> str:
    spread = "" if row.spread is None else f" +- {fixed(row.spread, 4)}"
    difference = "" if row.difference is None else f"  {signed(row.difference, 4)}"
    interval = "" if row.interval is None else f" ({' to '.join(signed(end, 4) for end in row.interval)})"
    return f"{fixed(row.mean, 4)}{spread}{difference}{interval}"
