"""The report of a study: what was measured, and what it tells."""

from collections.abc import Iterator
from pathlib import Path

from lightning_znorm.compare.document import Block, Code, Figure, Heading, Points, Text
from lightning_znorm.compare.files import write_text
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.html import to_html
from lightning_znorm.compare.markdown import to_markdown
from lightning_znorm.compare.report_conditions import conditions, pairing
from lightning_znorm.compare.report_curves import curve_figures, gradient_norms
from lightning_znorm.compare.report_metrics import metric_tables, with_interval
from lightning_znorm.compare.report_setup import setups
from lightning_znorm.compare.report_speed import speed


def write_report(findings: Findings, folder: Path) -> None:
    """Write ``report.md`` with its figures, and ``report.html``.

    Args:
        findings: What the study found.
        folder: Where to.
    """
    blocks = list(_blocks(findings))
    for block in blocks:
        if isinstance(block, Figure):
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            for kind, image in block.images.items():
                (folder / "figures" / f"{block.name}.{kind}").write_bytes(image)
    write_text(folder / "report.md", to_markdown(blocks))
    write_text(folder / "report.html", to_html(blocks, _title(findings)))


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
        f"`{plan.metric}` decides; {better} of it is better. {pairing(findings)}"
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
