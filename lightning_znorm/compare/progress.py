"""Live progress: what runs, what is done, and how much time is left."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text
from typing_extensions import Self

from lightning_znorm.compare.engines import LostError
from lightning_znorm.compare.formatting import clock, fixed, visible
from lightning_znorm.compare.processes import tail
from lightning_znorm.compare.results import read_progress, read_test
from lightning_znorm.compare.study import Outcome, Run

_LINES_AROUND = 6
"""The line above the table, its frame and header, and the line of the cursor."""
_Stamp: TypeAlias = tuple[int, int, int] | None


@dataclass(frozen=True)
class _View:
    """The content of the table without the estimate of time: it is drawn again only if this changes.

    Args:
        count: How many runs are done.
        rows: Method, seed, state and metric of each run that is shown.
        hidden: How many other runs there are of each kind; empty if there are none.
    """

    count: str
    rows: tuple[tuple[str, str, str, str], ...]
    hidden: str


class Preparation:
    """Shows how methods are read and tried, before the first run: a line that moves, or one for each event.

    Args:
        console: The terminal, or the file that replaces it.
        count: Number of methods, each at all values of a sweep.
    """

    def __init__(self, console: Console, count: int) -> None:
        self.console = console
        self.count = count
        self._start = time.monotonic()
        self._began: dict[str, float] = {}
        self._steps: dict[str, str] = {}
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._live = Live(
                console=self.console, get_renderable=self._line, refresh_per_second=4, transient=True
            ).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def tell(self, name: str, step: str) -> None:
        """Show what happens to a method. Threads may call this.

        Args:
            name: Name of the method.
            step: One of `plan.STEPS`.
        """
        with self._lock:
            now = time.monotonic()
            took = now - self._began.pop(name, now)
            self._steps[name] = step
            if step in ("reading", "trying"):
                self._began[name] = now
            if not self.console.is_interactive:
                self.console.print(Text(_writable(self._event(name, step, took), self.console)), soft_wrap=True)

    def _event(self, name: str, step: str, seconds: float) -> str:
        if step == "reading":
            return f"{name}: its settings are read"
        if step == "trying":
            return f"{name}: is tried on one batch"
        if step == "failed":
            return f"{name}: has failed on one batch, another value is tried"
        known = sum(other != "reading" for other in self._steps.values())
        if step == "read":
            return f"{name}: its settings were read in {clock(seconds)} ({known} of {self.count})"
        return f"{name}: was tried in {clock(seconds)} ({self._tried()})"

    def _tried(self) -> str:
        return f"{list(self._steps.values()).count('tried')} tried"

    def _line(self) -> Text:
        with self._lock:
            now = time.monotonic()
            current = [f"{name} {clock(now - began)}" for name, began in self._began.items()]
            steps = set(self._steps.values())
            if steps & {"trying", "tried"}:
                what = f"trying new methods on one batch, {self._tried()}"
            else:
                known = sum(step != "reading" for step in self._steps.values())
                what = f"reading settings, {known} of {self.count} are read"
        text = f"{clock(now - self._start)}  {what}{': ' if current else ''}{', '.join(current)}"
        return Text(_writable(text, self.console), no_wrap=True, overflow="ellipsis")


class Progress:
    """The state of every run.

    Args:
        runs: All runs.
        jobs: Number of runs at a time.
        metric: Metric to show for the runs that are done.
    """

    def __init__(self, runs: list[Run], jobs: int, metric: str) -> None:
        self.runs = runs
        self.jobs = jobs
        self.metric = metric
        self.outcomes: dict[Run, Outcome] = {}
        self.running: set[Run] = set()
        self.kept = {run for run in runs if run.is_done}
        self._start = time.monotonic()
        # States of files at the start of the study, not times: the clocks of other machines may differ.
        self._found = {run: _files(run) for run in runs}
        self._positions: dict[Run, tuple[_Stamp, tuple[int, float] | None]] = {}
        self._values: dict[Run, str] = {}

    def table(self, console: Console) -> Group:
        """Return a table with a row for each run. On a small screen, it has those that run, failed or ended last.

        Args:
            console: The terminal.
        """
        return self._drawn(self._view(console.height), console)

    def state(self, run: Run) -> str:
        """Return the state of a run in a few words."""
        outcome = self.outcomes.get(run)
        if outcome is not None:
            return "failed" if outcome.error else f"done in {clock(outcome.seconds)}"
        if run in self.running:
            if run.fit_file.is_file():
                return "is tested"
            position, share = self._position(run), self._share(run)
            if position is None:
                return "starts"
            return f"runs, {share:.0%}" if share else f"runs, epoch {position[0] + 1}"
        return "done before" if run in self.kept else "waits"

    def has_begun(self, run: Run) -> bool:
        """Return whether a process of the run, also of another study or machine, has written since the study began."""
        return _files(run) != self._found[run]

    def log_end(self, run: Run) -> str:
        """Return a sentence with the end of what the run printed since the study began."""
        log = self._found[run][0]
        try:
            text = tail(run.log, start=log[1] if log else 0)
        except OSError as error:
            return f"{run.log} cannot be read ({error.strerror})."
        return f"The end of {run.log}:\n{text}" if text else f"There is nothing new in {run.log}."

    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the runs that have ended and the shares of those that go on."""
        took = [outcome.seconds for outcome in self.outcomes.values() if not outcome.error]
        if not took:
            # No run has ended: assume that those that go on began with the study.
            share = sum(self._share(run) for run in self.running) / max(1, len(self.running))
            if not share:
                return None
            took = [(time.monotonic() - self._start) / share]
        waiting = [run for run in self.runs if run not in self.outcomes and run not in self.kept]
        shares = sum(1 - self._share(run) if run in self.running else 1.0 for run in waiting)
        at_a_time = min(max(self.jobs, len(self.running)), max(1, len(waiting)))  # a Ray cluster may run more
        return sum(took) / len(took) * shares / at_a_time

    def _view(self, height: int) -> _View:
        shown = self._shown(height)
        kinds = Counter(map(self._kind, set(self.runs) - set(shown)))
        hidden = ", ".join(f"{kinds[kind]} {kind}" for kind in ("run", "wait", "failed", "done") if kinds[kind])
        rows = tuple((run.method, str(run.seed), self.state(run), self._value(run)) for run in shown)
        return _View(self._count(), rows, f"not shown: {hidden}" if hidden else "")

    def _drawn(self, view: _View, console: Console) -> Group:
        def cell(text: str) -> Text:
            return Text(_writable(text, console), no_wrap=True, overflow="crop")

        table = RichTable()
        for name in ("method", "seed", "state", self.metric):
            table.add_column(cell(name), no_wrap=True, overflow="crop")
        for row in view.rows:
            table.add_row(*map(cell, row))
        return Group(cell(f"{view.count}, {self._left()}"), table, *([cell(view.hidden)] if view.hidden else []))

    def _shown(self, height: int) -> list[Run]:
        if len(self.runs) <= max(1, height - _LINES_AROUND):
            return self.runs
        ended = list(reversed(self.outcomes))
        by_weight = [
            *(run for run in self.runs if run in self.running),
            *(run for run in ended if self.outcomes[run].error),
            *(run for run in ended if not self.outcomes[run].error),
            *(run for run in self.runs if run not in self.outcomes and run not in self.running),
        ]
        chosen = set(by_weight[: max(1, height - _LINES_AROUND - 1)])
        return [run for run in self.runs if run in chosen]

    def _kind(self, run: Run) -> str:
        if run in self.outcomes:
            return "failed" if self.outcomes[run].error else "done"
        if run in self.running:
            return "run"
        return "done" if run in self.kept else "wait"

    def _share(self, run: Run) -> float:
        position = self._position(run)
        return position[1] if position and 0 <= position[1] <= 1 else 0.0

    def _position(self, run: Run) -> tuple[int, float] | None:
        """Return completed epochs and share of a run. Its file is read only if it has changed."""
        stamp = _stamp(run.progress_file)
        before, position = self._positions.get(run, (None, None))
        if stamp != before:
            with suppress(OSError, ValueError):  # the file is damaged: keep what was known before
                position = read_progress(run)
            self._positions[run] = stamp, position
        return position

    def _value(self, run: Run) -> str:
        if self._kind(run) != "done":
            return ""
        if run not in self._values:
            try:
                tested = read_test(run)
                value = None if tested is None else tested.metrics.get(self.metric)
            except (OSError, ValueError):  # the report says so
                value = None
            self._values[run] = "" if value is None else fixed(value, 4)
        return self._values[run]

    def _count(self) -> str:
        done = len(self.kept) + sum(not outcome.error for outcome in self.outcomes.values())
        failed = sum(bool(outcome.error) for outcome in self.outcomes.values())
        return f"{done} of {len(self.runs)} runs done" + (f", {failed} failed" if failed else "")

    def _left(self) -> str:
        seconds = self.seconds_left()
        return "time left unknown" if seconds is None else f"about {clock(seconds)} left"


def watch(futures: Mapping["Future[Outcome]", Run], progress: Progress, console: Console) -> None:
    """Show a live table until all runs have ended; without a terminal, print a line for each event.

    Args:
        futures: The run of each future.
        progress: The state of every run.
        console: The terminal, or the file that replaces it.
    """
    progress.kept -= set(futures.values())
    if not console.is_interactive:
        for event in _events(futures, progress, 0.2):
            console.print(Text(_writable(event, console)), soft_wrap=True)
        return
    shown = None
    with Live(console=console, auto_refresh=False) as live:
        for _ in chain([""], _events(futures, progress, 0.5, ticks=True)):
            seen = progress._view(console.height), console.size
            if seen != shown:
                shown = seen
                live.update(progress._drawn(seen[0], console), refresh=True)


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
            except Exception as error:  # from Ray, or from the disk of the run's folder
                reason = str(error) if isinstance(error, LostError) else f"{type(error).__name__}: {error}"
                progress.outcomes[run] = Outcome(run, f"{reason.rstrip('.')}. {progress.log_end(run)}")
            progress.running.discard(run)
            yield f"{run.name}: {progress.state(run)} ({progress._count()}, {progress._left()})"
        for future in waiting:
            run = futures[future]
            if run not in progress.running and progress.has_begun(run):
                progress.running.add(run)
                yield f"{run.name}: starts"
        if ticks:
            yield ""


def _files(run: Run) -> tuple[_Stamp, _Stamp]:
    return _stamp(run.log), _stamp(run.progress_file)


def _stamp(path: Path) -> _Stamp:
    """Return values that change whenever a file is written to or replaced; ``None`` if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _writable(text: str, console: Console) -> str:
    """Replace characters that the terminal cannot show, or that would move its cursor, by their numbers."""
    return visible(text).encode(console.encoding, "backslashreplace").decode(console.encoding)
