"""The report of a study: what was measured, and what it tells."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from lightning_znorm.compare.differences import Row, paired_interval
from lightning_znorm.compare.document import Block, Code, Figure, Grid, Heading, Points, Text
from lightning_znorm.compare.files import read_json, write_text
from lightning_znorm.compare.html import to_html
from lightning_znorm.compare.markdown import to_markdown
from lightning_znorm.compare.metrics import train_loss
from lightning_znorm.compare.numbers import fixed, minutes, signed
from lightning_znorm.compare.one_run import Outcome, command_to_fit, command_to_test
from lightning_znorm.compare.plots import plot
from lightning_znorm.compare.prepare import Plan, digest
from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.settings import differences
from lightning_znorm.compare.speed import GRADIENT_NORM, Reach, curves, overheads, reaches, step_seconds


class Report:
    """The report of a study.

    Args:
        plan: The study.
        rows: Every metric under every method.
        measurements: All that was logged by runs that are done.
        failures: Runs that failed.
        command: What was typed.
        jobs: How many runs went on at a time, at most.
    """

    def __init__(
        self,
        plan: Plan,
        rows: Sequence[Row],
        measurements: Sequence[Measurement],
        failures: Sequence[Outcome],
        command: str,
        jobs: int,
    ) -> None:
        self.plan = plan
        self.rows = rows
        self.measurements = measurements
        self.failures = failures
        self.command = command
        self.jobs = jobs
        self.methods = list(plan.study.files)
        self.done = [run for run in plan.study.runs if run.is_done]
        self.fits = {run: read_json(run.fit_file) for run in self.done}

    def write(self, folder: Path) -> None:
        """Write ``report.md`` with its figures, and ``report.html``."""
        blocks = list(self.blocks())
        for block in blocks:
            if isinstance(block, Figure):
                (folder / "figures").mkdir(parents=True, exist_ok=True)
                for kind, image in block.images.items():
                    (folder / "figures" / f"{block.name}.{kind}").write_bytes(image)
        write_text(folder / "report.md", to_markdown(blocks))
        write_text(folder / "report.html", to_html(blocks, self.title))

    @property
    def title(self) -> str:
        """What was compared, on what."""
        others = ", ".join(self.methods[1:])
        what = f"{others} against {self.methods[0]}" if others else self.methods[0]
        return f"{what}: {' + '.join(self.plan.study.configs) or 'an experiment of flags'}"

    def blocks(self) -> Iterator[Block]:
        """The content."""
        yield Heading(self.title, 1)
        yield from self._summary()
        yield from self._failures()
        yield Heading("Metrics")
        metrics = list(dict.fromkeys(row.metric for row in self.rows))
        for metric in metrics:
            yield from self._metric(metric)
        yield from self._speed()
        yield from self._curves()
        yield from self._gradient_norms()
        yield from self._conditions()

    def _summary(self) -> Iterator[Block]:
        plan, done = self.plan, len(self.done)
        seeds = ", ".join(map(str, plan.study.seeds))
        better = "more" if plan.mode == "max" else "less"
        yield Text(
            f"{done} of {len(plan.study.runs)} runs are done: {len(self.methods)} methods, seeds {seeds}. "
            f"`{plan.metric}` decides; {better} of it is better. Within a seed, all methods start from the same "
            "weights and see the same batches in the same order, so differences are taken seed by seed."
        )
        verdicts = [row for row in self.rows if row.metric == plan.metric and row.verdict]
        if verdicts:
            yield Points([f"{row.method}: {self._difference(row)}{row.verdict}" for row in verdicts])
        if len(verdicts) > 1:
            yield Text(
                f"{len(verdicts)} methods are compared, and each interval misses the truth once in 20 times: a single "
                "one that just excludes zero is weak evidence."
            )

    def _failures(self) -> Iterator[Block]:
        if not self.failures:
            return
        yield Heading("Failed runs")
        yield Text(
            f"{len(self.failures)} of {len(self.plan.study.runs)} runs failed, and are left out of everything below. "
            "The same command tries them again, from their last checkpoints."
        )
        for outcome in self.failures:
            yield Heading(outcome.run.name, 3)
            yield Code(outcome.error)

    def _metric(self, metric: str) -> Iterator[Block]:
        rows = [row for row in self.rows if row.metric == metric]
        where = "at the best checkpoint" if metric.startswith("test") else "of the last epoch"
        yield Heading(f"`{metric}`, {where}", 3)
        digits = self._digits(metric)
        table = []
        for row in rows:
            spread = "-" if row.spread is None else f"{row.spread:.{digits}f}"
            difference = "-" if row.difference is None else signed(row.difference, digits)
            interval = "-" if row.interval is None else " to ".join(signed(end, digits) for end in row.interval)
            mean = f"{row.mean:.{digits}f}"
            table.append((row.method, str(len(row.seeds)), mean, spread, difference, interval, row.verdict))
        header = ("method", "seeds", "mean", "spread", f"difference from {self.methods[0]}", "95 % interval", "")
        yield Grid(header, table, frozenset(range(1, 6)))

    def _speed(self) -> Iterator[Block]:
        yield Heading("Speed")
        for metric, mode in self._followed():
            found = reaches(self.measurements, metric, mode, self.methods)
            found = [reach for reach in found if reach.seeds]
            if found:
                yield Text(
                    f"Epochs and seconds of training (without validation) until `{metric}` is as good as "
                    f"{self.methods[0]}'s in its last epoch, seed by seed. Means where all seeds get there:"
                )
                header = ("method", "epochs", "seconds", "seeds that get there")
                yield Grid(header, [_reach(reach) for reach in found], frozenset(range(1, 4)))
        steps = step_seconds(self.measurements)
        if steps:
            first = steps.get(self.methods[0], {})
            rows = []
            for method in self.methods:
                if method in steps:
                    extra = overheads(steps[method], first) if method != self.methods[0] else []
                    interval = paired_interval(extra)
                    ends = "-" if interval is None else " to ".join(f"{end:+.1%}" for end in interval)
                    more = f"{fmean(extra):+.1%}" if extra else "-"
                    rows.append((method, f"{1000 * fmean(steps[method].values()):.4g}", more, ends))
            beside = f" Up to {self.jobs} runs went on side by side and slowed one another." if self.jobs > 1 else ""
            yield Text(
                "Time of a training step, with loading: the median over epochs after the first, mean over seeds. "
                "Whatever else the machine did is in it." + beside
            )
            yield Grid(
                ("method", "ms per step", f"more than {self.methods[0]}", "95 % interval"), rows, frozenset((1, 2, 3))
            )

    def _curves(self) -> Iterator[Block]:
        followed = self._followed()
        if followed:
            yield Heading("Curves")
        for metric, _ in followed:
            found = curves(self.measurements, metric)
            yield self._figure(_file_name(metric), found, metric, f"`{metric}` by epoch")

    def _gradient_norms(self) -> Iterator[Block]:
        names = sorted({m.metric for m in self.measurements if m.metric.startswith(GRADIENT_NORM)})
        yield Heading("Gradient norms")
        if not names:
            yield Text(
                "None were logged: a run has fewer steps than `trainer.log_every_n_steps`, or its strategy shards "
                "gradients."
            )
            return
        yield Text(
            "Norm of all gradients together, before a method or clipping changes them: mean over what was logged "
            "(every `log_every_n_steps` steps) in the first and in the last epoch, and over seeds."
        )
        for name in names:
            found = curves(self.measurements, name)
            rows = []
            for method in self.methods:
                by_seed = found.get(method, {}).values()
                if by_seed:
                    ends = (fmean(curve[pick(curve)] for curve in by_seed) for pick in (min, max))
                    rows.append((method, *(f"{value:.4g}" for value in ends)))
            yield Grid(("method", "first epoch", "last epoch"), rows, frozenset((1, 2)))
            label = name.removeprefix("compare/").replace("_", " ")
            yield self._figure(_file_name(label), found, label, f"{label.capitalize()} by epoch, before the method")

    def _conditions(self) -> Iterator[Block]:
        plan = self.plan
        yield Heading("How it was measured")
        chosen = (
            f"that of the epoch with the best `{plan.monitor[0]}` ({plan.monitor[1]})"
            if plan.monitor
            else "the last one"
        )
        yield Points(
            [
                f"Test metrics are those of each run's best checkpoint, {chosen}; all others are of the last epoch.",
                "Spread is the standard deviation over seeds. The interval is Student's t on the seeds' differences.",
                "Every epoch begins with random numbers that follow from seed and epoch alone.",
            ]
        )
        seconds = sum(fit["seconds"] for fit in self.fits.values())
        for key in ("device", "threads", "parameters", "epochs"):
            found = sorted({str(fit[key]) for fit in self.fits.values()})
            if found:
                yield Text(f"{key.capitalize()}: {'; '.join(found)}.")
        versions = sorted({", ".join(f"{k} {v}" for k, v in fit["versions"].items()) for fit in self.fits.values()})
        if versions:
            yield Text(f"Versions: {'; '.join(versions)}.")
            yield Text(f"Training alone took {minutes(seconds)}, all runs together.")
        if len(versions) > 1:
            yield Text("The runs were not made with the same versions, so a difference may be theirs.")
        yield Heading("Methods")
        first = plan.settings[self.methods[0]]
        rows = [
            (method, key, old, new)
            for method in self.methods[1:]
            for key, old, new in differences(first, plan.settings[method])
        ]
        if rows:
            yield Grid(("method", "setting", self.methods[0], "its own"), rows)
        elif len(self.methods) > 1:
            yield Text("The methods' settings do not differ.")
        hashes = ", ".join(f"{name} `{digest(settings)}`" for name, settings in plan.settings.items())
        yield Text(f"Hashes of the resulting settings: {hashes}.")
        yield Heading("Commands")
        yield Text("The study:")
        yield Code(self.command)
        yield Text("One run of it, with the settings that were written for it, and as it would be typed by hand:")
        run = plan.study.runs[-1]
        commands = (command_to_fit(run)[:3], command_to_test(run))
        ours = [f"python -m lightning_znorm {shlex.join(map(near, args))}" for args in commands]
        by_hand = [*plan.study.fit_args(run.method), "--seed_everything", str(run.seed)]
        yield Code("\n".join([*ours, "", f"python -m lightning_znorm {shlex.join(by_hand)}"]))

    def _digits(self, metric: str) -> int:
        return fixed(number for row in self.rows if row.metric == metric for number in (row.spread, row.difference))

    def _difference(self, row: Row) -> str:
        if row.difference is None:
            return ""
        digits = self._digits(row.metric)
        interval = "" if row.interval is None else f" ({' to '.join(signed(end, digits) for end in row.interval)})"
        return f"{signed(row.difference, digits)}{interval}. "

    def _followed(self) -> list[tuple[str, str]]:
        """The training loss and the validation metric, with their modes."""
        logged = {measurement.metric for measurement in self.measurements}
        loss = train_loss(logged)
        found = [(loss, "min")] if loss else []
        if self.plan.monitor and self.plan.monitor[0] in logged and self.plan.monitor[0] != loss:
            found.append(self.plan.monitor)
        return found

    def _figure(
        self, name: str, found: Mapping[str, Mapping[int, Mapping[int, float]]], label: str, what: str
    ) -> Figure:
        several = max(map(len, found.values()), default=1) > 1
        band = " Line: mean over seeds; band: from the lowest seed to the highest." if several else ""
        return Figure(name, f"{what}.{band}", plot(found, self.methods, label))


def near(path: str | Path) -> str:
    """A path as seen from the working directory, if it is in it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def _reach(reach: Reach) -> tuple[str, str, str, str]:
    get_there = f"{len(reach.epochs)} of {reach.seeds}"
    if len(reach.epochs) < reach.seeds:  # a mean over the lucky ones would mislead
        return reach.method, "-", "-", get_there
    return reach.method, f"{fmean(reach.epochs):.1f}", f"{fmean(reach.seconds):.4g}", get_there
