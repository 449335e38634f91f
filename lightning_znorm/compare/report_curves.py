"""The part of a report that has figures: what is followed from epoch to epoch, and the size of gradients."""

import re
from collections.abc import Iterator

from lightning_znorm.compare.document import Block, Figure, Grid, Heading, Text, code
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.numbers import mean
from lightning_znorm.compare.plots import Curves, plot
from lightning_znorm.compare.results import GRADIENT_NORM, curves


def curve_figures(findings: Findings) -> Iterator[Block]:
    """The training loss and the validation metric by epoch."""
    if findings.followed:
        yield Heading("Curves")
    for metric, _ in findings.followed:
        yield _figure(findings, metric, curves(findings.measurements, metric), f"{code(metric)} by epoch")


def gradient_norms(findings: Findings) -> Iterator[Block]:
    """Norms at the beginning and at the end, and by epoch."""
    names = sorted({m.metric for m in findings.measurements if m.metric.startswith(GRADIENT_NORM)})
    yield Heading("Gradient norms")
    if not names:
        yield Text(
            f"None were logged: a run has fewer steps than {code('trainer.log_every_n_steps')}, or its strategy shards "
            "gradients."
        )
        return
    yield Text(
        "Norm of all gradients together, before a method or clipping changes them: mean over what was logged "
        f"(every {code('log_every_n_steps')} steps) in the first and in the last epoch, and over seeds."
    )
    for name in names:
        found = curves(findings.measurements, name)
        rows = []
        for method in findings.methods:
            by_seed = found.get(method, {}).values()
            if by_seed:
                ends = (mean(curve[pick(curve)] for curve in by_seed) for pick in (min, max))
                rows.append((method, *(f"{value:.4g}" for value in ends)))
        yield Grid(("method", "first epoch", "last epoch"), rows, frozenset((1, 2)))
        label = name.removeprefix("compare/").replace("_", " ")
        yield _figure(findings, label, found, f"{label.capitalize()} by epoch, before the method")


def _figure(findings: Findings, label: str, found: Curves, what: str) -> Figure:
    several = max(map(len, found.values()), default=1) > 1
    band = " Line: mean over seeds; band: from the lowest seed to the highest." if several else ""
    name = re.sub(r"[^\w.]+", "-", label).strip("-.") or "figure"
    return Figure(name, f"{what}.{band}", plot(found, findings.methods, label))
