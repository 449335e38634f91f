"""Checks of the values of masks and labels, in every batch."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from lightning_znorm.errors import ZNormValueError
from lightning_znorm.metrics.mask_metric import at_least_float32, orderable, widest_float

STAGES = ("training", "validation", "test")
# A number in bfloat16 is off by up to 0.4 %, and Mixup and label smoothing round a few times.
_SUM_TOLERANCE = 0.02


class TargetCheck:
    """A check that targets are in range, not NaN and, if they must be, whole numbers.

    Reading a value makes the program wait for its device. :meth:`require` does so. :meth:`note` does not: it counts
    wrong batches on the device, and :meth:`refuse` reads the count when the program waits anyway.

    Args:
        name: What messages call the targets, such as ``"Masks"``.
        last: Targets run from 0 to this value.
        only_whole: Whether targets must be whole numbers.
        settings: The settings of the task that say so, for messages.
        remedy: What to do about wrong targets, for messages.
        ignored: A value that is allowed as well, for pixels that do not count.
    """

    ignored: int | None = None  # of the class, so that checks that were pickled before there was one have it too

    def __init__(
        self, name: str, last: int, only_whole: bool, settings: str, remedy: str, ignored: int | None = None
    ) -> None:
        self.name = name
        self.last = last
        self.only_whole = only_whole
        self.settings = settings
        self.remedy = remedy
        self.ignored = ignored
        self._notes: dict[str, Tensor] = {}

    def require(self, targets: Tensor, stage: str, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Raise if a target of a batch is wrong. This waits for the device.

        Args:
            targets: The targets of a batch.
            stage: One of ``STAGES``.
            batch_idx: Number of the batch in its epoch.
            dataloader_idx: Number of the loader, where there are several.

        Raises:
            ValueError: If a target is wrong.
        """
        if _has_values(targets):
            low, high, misfit = self._bounds(targets)
            if misfit:
                raise ZNormValueError(self._message(float(low), float(high), _where(stage, batch_idx, dataloader_idx)))

    def note(self, targets: Tensor, stage: str, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Count a batch on its device if a target is wrong. This waits for nothing.

        Args:
            targets: The targets of a batch.
            stage: One of ``STAGES``.
            batch_idx: Number of the batch in its epoch.
            dataloader_idx: Number of the loader, where there are several.

        Returns:
            Targets from which a loss can be computed: zeros if one is wrong, because a wrong class number would kill a
            CUDA process. And whether a target is wrong, a bool scalar.
        """
        if not _has_values(targets):
            return targets, torch.zeros((), dtype=torch.bool, device=targets.device)
        notes = self._notes.get(stage, _no_notes(targets.device))
        low, high, misfit = self._bounds(targets)
        batch, loader = (torch.full_like(notes[0], number) for number in (batch_idx, dataloader_idx))
        first = torch.stack([batch, loader, low.to(batch.dtype), high.to(batch.dtype)])
        is_first = misfit & (notes[0] == 0)
        self._notes[stage] = torch.cat([(notes[0] + misfit).view(1), torch.where(is_first, first, notes[1:])])
        return orderable(targets).masked_fill(misfit, 0), misfit

    def notes(self, device: torch.device) -> Tensor:
        """Return the count of wrong batches of each stage, and the first one's number, loader, minimum and maximum.

        Args:
            device: The device of the result.

        Returns:
            Shape ``(stages, 5)``.
        """
        return torch.stack([self._notes.get(stage, _no_notes(device)) for stage in STAGES])

    def clear(self) -> None:
        """Forget what has been noted."""
        self._notes.clear()

    def refuse(self, notes: Tensor) -> None:
        """Raise if a wrong batch was counted, and forget the counts. This waits for the device.

        Args:
            notes: What :meth:`notes` returned in each process, shape ``(processes, stages, 5)``.

        Raises:
            ValueError: If a target of any process was wrong.
        """
        ranks, by_stage = len(notes), notes.transpose(0, 1).tolist()
        for stage, of_ranks in zip(STAGES, by_stage, strict=True):
            total = sum(int(batches) for batches, *_ in of_ranks)
            for rank, (batches, batch_idx, dataloader_idx, low, high) in enumerate(of_ranks):
                if batches:
                    self.clear()
                    where = _where(stage, int(batch_idx), int(dataloader_idx))
                    where += f" on rank {rank}" if ranks > 1 else ""
                    where += f" (one of {total} such batches)" if total > 1 else ""
                    raise ZNormValueError(self._message(low, high, where))

    def _bounds(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the smallest and the greatest target, NaN if one is NaN, and whether one is wrong."""
        values = orderable(targets.detach())
        if self.ignored is not None:
            values = values.masked_fill(values == self.ignored, 0)
        low, high = values.aminmax()
        fits = (low >= 0) & (high <= self.last)  # false for NaN
        if self.only_whole and values.is_floating_point():
            fits = fits & (values == values.trunc()).all()
        return low, high, ~fits

    def _message(self, low: float, high: float, where: str) -> str:
        if math.isnan(low):
            return f"{self.name} hold NaN in {where}: correct them, or leave out the data that hold it."
        fractions = low >= 0 and high <= self.last
        found = "are not whole numbers" if fractions else f"run from {low:g} to {high:g}"
        numbers = "whole numbers from 0" if self.only_whole else "0"
        ignored = "" if self.ignored is None else f", and {self.ignored} for pixels that do not count"
        allowed = f"{numbers} to {self.last}{ignored}"
        return f"{self.name} {found} in {where}, and {self.settings} allows {allowed}: {self.remedy}."


class ProbabilitySumCheck(TargetCheck):
    """A check that class probabilities add up to 1. Those of no class, or of several at once, do not."""

    def __init__(self) -> None:
        super().__init__(
            "Sums of class probabilities",
            last=1,
            only_whole=False,
            settings="cross entropy",
            remedy="divide those of each image by their sum; labels of no class, or of several at once, do not fit",
        )

    @override
    def _bounds(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = at_least_float32(targets.detach()).sum(dim=1).aminmax()
        fits = (low >= 1 - _SUM_TOLERANCE) & (high <= 1 + _SUM_TOLERANCE)
        return low, high, ~fits

    @override
    def _message(self, low: float, high: float, where: str) -> str:
        return f"{self.name} run from {low:g} to {high:g} in {where}, and for {self.settings} must be 1: {self.remedy}."


def _has_values(targets: Tensor) -> bool:
    return targets.dtype != torch.bool and targets.numel() > 0


def _where(stage: str, batch_idx: int, dataloader_idx: int) -> str:
    return f"batch {batch_idx} of {stage}" + (f" loader {dataloader_idx}" if dataloader_idx else "")


def _no_notes(device: torch.device) -> Tensor:
    return torch.zeros(5, dtype=widest_float(device), device=device)
