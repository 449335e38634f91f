"""The part of a report on how soon methods get anywhere, and what their steps cost."""

from collections.abc import Iterator

from lightning_znorm.compare.differences import paired_interval
from lightning_znorm.compare.document import Block, Grid, Heading, Text, code
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.numbers import mean
from lightning_znorm.compare.speed import Reach, overheads, reaches, step_seconds


def speed(findings: Findings) -> Iterator[Block]:
    """Epochs and seconds to where the first method ends, and time per step."""
    yield Heading("Speed")
    if not findings.alone:
        yield Text(
            "Runs went on side by side and slowed one another: seconds here are of the machine's load as much as of "
            f"the methods, and say nothing about their costs. {code('--jobs 1')} measures those."
        )
    first = findings.methods[0]
    for metric, mode in findings.followed:
        found = [reach for reach in reaches(findings.measurements, metric, mode, findings.methods) if reach.seeds]
        if found:
            yield Text(
                f"Epochs and seconds of training (without validation) until {code(metric)} is as good as {first}'s in "
                "its last epoch, seed by seed. Means where all seeds get there:"
            )
            header = ("method", "epochs", "seconds", "seeds that get there")
            yield Grid(header, [_reach(reach) for reach in found], frozenset(range(1, 4)))
    steps = step_seconds(findings.measurements)
    if steps:
        yield from _steps(findings, steps)


def _steps(findings: Findings, steps: dict[str, dict[int, float]]) -> Iterator[Block]:
    first = findings.methods[0]
    yield Text(
        "Time of a training step, with loading: the median over epochs after the first, mean over seeds. Whatever else "
        "the machine did is in it."
    )
    header = ["method", "ms per step"]
    rows = [[method, f"{1000 * mean(steps[method].values()):.4g}"] for method in findings.methods if method in steps]
    if findings.alone:
        header += [f"more than {first}", "95 % interval"]
        rows = [[*row, *_overhead(steps[row[0]], steps.get(first, {}), row[0] == first)] for row in rows]
    yield Grid(header, rows, frozenset((1, 2, 3)))


def _overhead(own: dict[int, float], first: dict[int, float], is_first: bool) -> tuple[str, str]:
    extra = [] if is_first else overheads(own, first)
    interval = paired_interval(extra)
    ends = "-" if interval is None else " to ".join(f"{end:+.1%}" for end in interval)
    return f"{mean(extra):+.1%}" if extra else "-", ends


def _reach(reach: Reach) -> tuple[str, str, str, str]:
    get_there = f"{len(reach.epochs)} of {reach.seeds}"
    if len(reach.epochs) < reach.seeds:  # a mean over the lucky ones would mislead
        return reach.method, "-", "-", get_there
    return reach.method, f"{mean(reach.epochs):.1f}", f"{mean(reach.seconds):.4g}", get_there
