"""What runs, what is done, and how long the rest will take."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_znorm.compare.files import read_json
from lightning_znorm.compare.numbers import clock
from lightning_znorm.compare.one_run import Outcome
from lightning_znorm.compare.results import read_test
from lightning_znorm.compare.study import Run


class Progress:
    """The state of every run.

    Args:
        runs: All runs.
        jobs: How many go on at a time.
        metric: Metric to show of those that are done.
    """

    def __init__(self, runs: list[Run], jobs: int, metric: str) -> None:
        self.runs = runs
        self.jobs = jobs
        self.metric = metric
        self.outcomes: dict[Run, Outcome] = {}
        self.running: set[Run] = set()
        self.kept = {run for run in runs if run.is_done}
        self._start = time.time()

    def table(self) -> Table:
        """One row for each run."""
        table = Table("method", "seed", "state", self.metric, title=f"{self._count()}, {self._left()}")
        for run in self.runs:
            table.add_row(run.method, str(run.seed), self.state(run), self._value(run))
        return table

    def state(self, run: Run) -> str:
        """A word or two on a run."""
        outcome = self.outcomes.get(run)
        if run in self.kept:
            return "done before"
        if outcome is not None:
            return "failed" if outcome.error else f"done in {clock(outcome.seconds)}"
        if run not in self.running:
            return "waits"
        if run.fit_file.is_file():
            return "is tested"
        progress = read_json(run.progress_file)
        if progress is None:
            return "starts"
        return f"runs, {progress['share']:.0%}" if progress["share"] else f"runs, epoch {progress['epoch'] + 1}"

    def has_begun(self, run: Run) -> bool:
        """Whether a process of the run has written since the study began; it may be another study's or elsewhere."""
        files = (run.log, run.progress_file)
        return any(file.is_file() and file.stat().st_mtime >= self._start for file in files)

    def seconds_left(self) -> float | None:
        """Estimate, from the runs that have ended and the shares of those that have not."""
        took = [outcome.seconds for outcome in self.outcomes.values() if not outcome.error]
        if not took:
            # None has ended: those that run began together, some time ago.
            share = sum(self._share(run) for run in self.running) / max(1, len(self.running))
            if not share:
                return None
            took = [(time.time() - self._start) / share]
        waiting = [run for run in self.runs if run not in self.outcomes and run not in self.kept]
        shares = sum(1 - self._share(run) if run in self.running else 1.0 for run in waiting)
        at_a_time = min(max(self.jobs, len(self.running)), max(1, len(waiting)))  # on Ray, as many as find place
        return sum(took) / len(took) * shares / at_a_time

    def _share(self, run: Run) -> float:
        return float((read_json(run.progress_file) or {}).get("share", 0))

    def _value(self, run: Run) -> str:
        tested = read_test(run)
        value = None if tested is None else tested.metrics.get(self.metric)
        return "" if value is None else f"{value:.4f}"

    def _count(self) -> str:
        done = len(self.kept) + sum(not outcome.error for outcome in self.outcomes.values())
        failed = sum(bool(outcome.error) for outcome in self.outcomes.values())
        return f"{done} of {len(self.runs)} runs done" + (f", {failed} failed" if failed else "")

    def _left(self) -> str:
        seconds = self.seconds_left()
        return "time left unknown" if seconds is None else f"about {clock(seconds)} left"


def watch(futures: Mapping["Future[Outcome]", Run], progress: Progress, console: Console) -> None:
    """Show a live table until all runs have ended; where there is no terminal, a line for each event."""
    if not console.is_terminal:
        for event in _events(futures, progress, 0.2):
            console.print(event, highlight=False, markup=False, soft_wrap=True)
        return
    with Live(progress.table(), console=console, refresh_per_second=2) as live:
        for _ in _events(futures, progress, 0.5, ticks=True):
            live.update(progress.table())


def _events(
    futures: Mapping["Future[Outcome]", Run], progress: Progress, seconds: float, ticks: bool = False
) -> Iterator[str]:
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=seconds, return_when=FIRST_COMPLETED)
        for future in ended:
            run = futures[future]
            try:
                progress.outcomes[run] = future.result()
            except Exception as error:  # of Ray, or of what the run's folder is on
                progress.outcomes[run] = Outcome(run, f"{type(error).__name__}: {error}")
            progress.running.discard(run)
            yield f"{run.name}: {progress.state(run)} ({progress._count()}, {progress._left()})"
        for future in waiting:
            run = futures[future]
            if run not in progress.running and progress.has_begun(run):
                progress.running.add(run)
                yield f"{run.name}: starts"
        if ticks:
            yield ""
