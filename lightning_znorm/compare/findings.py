"""All that a report is about."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_znorm.compare.differences import Row
from lightning_znorm.compare.metrics import train_loss
from lightning_znorm.compare.one_run import Outcome
from lightning_znorm.compare.prepare import Plan
from lightning_znorm.compare.results import Evaluation, Measurement, read_fit, read_test
from lightning_znorm.compare.study import Run
from lightning_znorm.compare.tables import make_rows


@dataclass(frozen=True)
class Findings:
    """What a study found, and how.

    Args:
        plan: The study.
        measurements: All that was logged by runs that are done.
        failures: Runs that failed.
        command: What was typed.
        alone: Whether each run had the machine to itself, as far as the study knows.
    """

    plan: Plan
    measurements: Sequence[Measurement]
    failures: Sequence[Outcome]
    command: str
    alone: bool

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods; the others are compared with the first."""
        return list(self.plan.study.files)

    @cached_property
    def rows(self) -> list[Row]:
        """Every metric under every method."""
        return list(make_rows(self.plan, self.measurements))

    @cached_property
    def done(self) -> list[Run]:
        """Runs that are done, but for those whose files could not be read."""
        failed = {outcome.run for outcome in self.failures}
        return [run for run in self.plan.study.runs if run.is_done and run not in failed]

    @cached_property
    def fits(self) -> dict[Run, dict[str, Any]]:
        """What runs that are done say of their training."""
        found = {run: read_fit(run) for run in self.done}
        return {run: fit for run, fit in found.items() if fit is not None}

    @cached_property
    def tests(self) -> dict[Run, Evaluation]:
        """What runs that are done were tested at, and found."""
        found = {run: read_test(run) for run in self.done}
        return {run: tested for run, tested in found.items() if tested is not None}

    @property
    def which(self) -> str:
        """Which checkpoint was tested, ``"best"`` or ``"last"``."""
        return "best" if self.plan.monitored else "last"

    @cached_property
    def tested(self) -> set[str]:
        """Names of what was measured at the tested checkpoint, not in training."""
        return {metric for tested in self.tests.values() for metric in tested.metrics}

    @cached_property
    def followed(self) -> list[tuple[str, str]]:
        """The training loss and the validation metric, with their modes."""
        logged = {measurement.metric for measurement in self.measurements}
        loss = train_loss(logged)
        found = [(loss, "min")] if loss else []
        if self.plan.monitor and self.plan.monitor[0] in logged and self.plan.monitor[0] != loss:
            found.append(self.plan.monitor)
        return found
