"""The measurement of gradients at the steps that the Trainer logs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_znorm.callbacks.steps import Step, unwrapped
from lightning_znorm.gradients.apply import GradientSummary, measure_slots
from lightning_znorm.gradients.slots import GradientSlot


@dataclass(frozen=True, eq=False)
class GradientMeasurement:
    """What was measured of the gradients of one step.

    Attributes:
        logged_step: The number under which Lightning logs what happens in this step.
        optimizer_number: The number of the optimizer; ``None`` if there is only one.
        slots: The slots that have a gradient.
        summary: Statistics of these gradients, one value for each slot.
    """

    logged_step: int
    optimizer_number: int | None
    slots: list[GradientSlot]
    summary: GradientSummary

    @property
    def norm(self) -> float:
        """The Euclidean norm of all gradients together."""
        return float(torch.linalg.vector_norm(self.summary.norm))

    @property
    def relative_size(self) -> Tensor:
        r"""By how much more ZNorm enlarges each gradient than all finite ones together, one value for each slot.

        .. math:: \frac{\lVert z_l \rVert / \lVert g_l \rVert}{\lVert z \rVert / \lVert g \rVert}

        It is the change of a tensor's share of a step that is proportional to the gradient, as that of SGD is. NaN for
        gradients that are not finite, or zero.
        """
        summary = self.summary
        sizes = (summary.znorm_norm, summary.norm)
        after, before = (torch.linalg.vector_norm(size[summary.is_finite]) for size in sizes)
        relative: Tensor = (summary.znorm_norm / summary.norm) / (after / before)
        return relative.masked_fill(~(summary.is_finite & relative.isfinite()), torch.nan)


class GradientMeter:
    """Measure the gradients at the steps that the Trainer logs, once for each batch and optimizer.

    Of several evaluations of one optimizer in a batch (LBFGS, or several steps), the first one is measured. Where
    gradients are sharded, all processes must ask at the same steps: they exchange two small sums for each process
    group.

    Args:
        eps: The ``eps`` of the ZNorm that the summary compares with.
    """

    def __init__(self, eps: float = 1e-10) -> None:
        self._eps = eps
        self._measured: set[int] = set()  # numbers of the optimizers that were measured in this batch

    def start_batch(self) -> None:
        """Note that a training batch begins."""
        self._measured.clear()

    def measure(self, step: Step) -> GradientMeasurement | None:
        """Measure the gradients of a step, if it is one to measure.

        Args:
            step: The step that is about to be taken.

        Returns:
            The measurement; ``None`` for a step that is not measured.

        Raises:
            UnsupportedGradientError: If a gradient is sparse, of 8 bits, or sharded in an unknown way.
        """
        if step.is_repeat or not step.is_training or not logs_this_step(step.trainer):
            return None
        optimizers = [unwrapped(optimizer) for optimizer in step.trainer.optimizers]
        number = optimizers.index(step.optimizer) if len(optimizers) > 1 else 0
        if number in self._measured:
            return None
        self._measured.add(number)
        with_gradient, statistics = measure_slots(step.slots(), step.loss_scale())
        return GradientMeasurement(
            logged_step(step.trainer),
            number if len(optimizers) > 1 else None,
            with_gradient,
            GradientSummary(statistics, self._eps),
        )


# Lightning has no public names for whether `self.log` logs now, and under which step.
# tests/callbacks/test_gradient_monitor.py compares with what `self.log` does.
def logs_this_step(trainer: Any) -> bool:
    """Return whether the Trainer logs the current step; a run with ``fast_dev_run`` counts each step as logged."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)


def logged_step(trainer: Any) -> int:
    """Return the number under which Lightning logs what happens now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)
