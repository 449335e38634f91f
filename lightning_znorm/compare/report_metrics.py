"""The part of a report that has a table for each metric."""

from collections.abc import Iterator

from lightning_znorm.compare.differences import Row
from lightning_znorm.compare.document import Block, Grid, Heading, code
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.numbers import decimals, fixed, signed


def metric_tables(findings: Findings) -> Iterator[Block]:
    """Every metric under every method, and how it differs from the first."""
    yield Heading("Metrics")
    header = (
        "method",
        "seeds",
        "mean",
        "spread",
        f"difference from {findings.methods[0]}",
        "95 % interval",
        "in words",
    )
    for metric in dict.fromkeys(row.metric for row in findings.rows):
        where = f"at the {findings.which} checkpoint" if metric in findings.tested else "of the last epoch"
        yield Heading(f"{code(metric)}, {where}", 3)
        digits = _decimals(findings, metric)
        rows = [_cells(row, digits) for row in findings.rows if row.metric == metric]
        yield Grid(header, rows, frozenset(range(1, 6)))


def with_interval(findings: Findings, row: Row) -> str:
    """A difference and its interval, to begin a sentence with."""
    if row.difference is None:
        return ""
    digits = _decimals(findings, row.metric)
    interval = "" if row.interval is None else f" ({_interval(row.interval, digits)})"
    return f"{signed(row.difference, digits)}{interval}. "


def _cells(row: Row, digits: int) -> tuple[str, ...]:
    spread = "-" if row.spread is None else fixed(row.spread, digits)
    difference = "-" if row.difference is None else signed(row.difference, digits)
    interval = "-" if row.interval is None else _interval(row.interval, digits)
    return (row.method, str(len(row.seeds)), fixed(row.mean, digits), spread, difference, interval, row.verdict)


def _interval(interval: tuple[float, float], digits: int) -> str:
    return " to ".join(signed(end, digits) for end in interval)


def _decimals(findings: Findings, metric: str) -> int:
    rows = [row for row in findings.rows if row.metric == metric]
    return decimals([number for row in rows for number in (row.spread, row.difference)], [row.mean for row in rows])
