"""The report of a study: what was measured, and what it tells."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from lightning_znorm.compare.document import Block, Code, Figure, Heading, Points, Text, code
from lightning_znorm.compare.files import named, write_text
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.html import to_html
from lightning_znorm.compare.markdown import to_markdown
from lightning_znorm.compare.report_conditions import conditions, pairing
from lightning_znorm.compare.report_curves import curve_figures, gradient_norms
from lightning_znorm.compare.report_metrics import metric_tables, with_interval
from lightning_znorm.compare.report_setup import setups
from lightning_znorm.compare.report_speed import speed

_LONGEST_NAME = 100
"""Bytes of a figure's file name, without its ending; a metric's name may be of any length."""


def write_report(findings: Findings, folder: Path) -> None:
    """Write ``report.md`` with its figures, and ``report.html``.

    Args:
        findings: What the study found.
        folder: Where to.

    Raises:
        OSError: With its path, if a file cannot be written; all the others are written.
    """
    blocks = list(_with_files(_blocks(findings)))
    files: dict[Path, str | bytes] = {
        folder / "report.md": to_markdown(blocks),
        folder / "report.html": to_html(blocks, _title(findings)),
    }
    for block in blocks:
        if isinstance(block, Figure):
            files |= {folder / "figures" / f"{block.name}.{kind}": image for kind, image in block.images.items()}
    errors = []
    for path, content in files.items():
        try:
            _write(path, content)
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _write(path: Path, content: str | bytes) -> None:
    if isinstance(content, str):
        write_text(path, content)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        with suppress(OSError):  # half an image, or that of an older report
            path.unlink(missing_ok=True)
        raise named(error, path) from error


def _with_files(blocks: Iterable[Block]) -> Iterator[Block]:
    """Give every figure a file name of its own, also where letters' case does not count, that no disk refuses."""
    taken: set[str] = set()
    for block in blocks:
        if isinstance(block, Figure):
            short = block.name.encode()[:_LONGEST_NAME].decode(errors="ignore")
            names = (short if i == 1 else f"{short}-{i}" for i in count(1))
            block = replace(block, name=next(name for name in names if name.casefold() not in taken))
            taken.add(block.name.casefold())
        yield block


def _title(findings: Findings) -> str:
    first, *others = findings.methods
    what = f"{', '.join(others)} against {first}" if others else first
    return f"{what}: {' + '.join(findings.plan.study.configs) or 'an experiment of flags'}"


def _blocks(findings: Findings) -> Iterator[Block]:
    yield Heading(_title(findings), 1)
    yield from _summary(findings)
    yield from setups(findings)
    yield from _failures(findings)
    yield from metric_tables(findings)
    yield from speed(findings)
    yield from curve_figures(findings)
    yield from gradient_norms(findings)
    yield from conditions(findings)


def _summary(findings: Findings) -> Iterator[Block]:
    plan = findings.plan
    seeds = ", ".join(map(str, plan.study.seeds))
    better = "more" if plan.mode == "max" else "less"
    done = f"{len(findings.fits)} of {len(plan.study.runs)} runs are done"
    yield Text(
        f"{done}: {len(findings.methods)} methods, seeds {seeds}. "
        f"{code(plan.metric)} decides; {better} of it is better. {pairing(findings)}"
    )
    verdicts = [row for row in findings.rows if row.metric == plan.metric and row.verdict]
    if verdicts:
        yield Points([f"{row.method}: {with_interval(findings, row)}{row.verdict}" for row in verdicts])
    if len(verdicts) > 1:
        yield Text(
            f"{len(verdicts)} methods are compared, and each interval misses the truth once in 20 times: a single "
            "one that just excludes zero is weak evidence."
        )


def _failures(findings: Findings) -> Iterator[Block]:
    if not findings.failures:
        return
    yield Heading("Failed runs")
    yield Text(
        f"{len(findings.failures)} of {len(findings.plan.study.runs)} runs failed, and are left out of everything "
        "below. The same command tries them again, from their last checkpoints."
    )
    for outcome in findings.failures:
        yield Heading(outcome.run.name, 3)
        yield Code(outcome.error)
