"""Checks the values of masks and labels, in every batch."""

import math

import torch
from torch import Tensor

from lightning_znorm.errors import ZNormValueError
from lightning_znorm.metrics.dtypes import orderable, widest_float

STAGES = ("training", "validation", "test")


class TargetCheck:
    """Refuse targets that are out of range, NaN, or between whole numbers where only these will do.

    To read a value makes the program wait for its device. :meth:`require` does so. :meth:`note` does not: it counts on
    the device, for :meth:`refuse` to read when the program waits anyway.

    Args:
        name: What the targets are called in messages, such as ``"Masks"``.
        last: Targets run from 0 to this.
        only_whole: Whether they must be whole numbers.
        settings: What of the task's settings says so, for messages.
        remedy: What to do about it, for messages.
    """

    def __init__(self, name: str, last: int, only_whole: bool, settings: str, remedy: str) -> None:
        self.name = name
        self.last = last
        self.only_whole = only_whole
        self.settings = settings
        self.remedy = remedy
        self._notes: dict[str, Tensor] = {}

    def require(self, targets: Tensor, stage: str, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Raise if a target of a batch is wrong; waits for the device.

        Args:
            targets: Those of a batch.
            stage: One of ``STAGES``.
            batch_idx: Number of the batch in its epoch.
            dataloader_idx: Number of the loader, where there are several.

        Raises:
            ValueError: If a target is wrong.
        """
        if _has_values(targets):
            low, high, misfit = self._bounds(targets)
            if misfit:
                raise ZNormValueError(self._message(float(low), float(high), _place(stage, batch_idx, dataloader_idx)))

    def note(self, targets: Tensor, stage: str, batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """Count a batch on its device if a target is wrong; waits for nothing.

        Args:
            targets: Those of the batch.
            stage: One of ``STAGES``.
            batch_idx: Number of the batch in its epoch.
            dataloader_idx: Number of the loader, where there are several.

        Returns:
            Targets that a loss can be computed of: zeros if one is wrong, for as the number of a class it would kill a
            CUDA process. And whether one is, a bool scalar.
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
        """Return, for each stage, the count of wrong batches; of the first its number, loader, minimum and maximum."""
        return torch.stack([self._notes.get(stage, _no_notes(device)) for stage in STAGES])

    def clear(self) -> None:
        """Forget what has been noted."""
        self._notes.clear()

    def refuse(self, notes: Tensor) -> None:
        """Raise if a batch has been counted, and forget it; waits for the device.

        Args:
            notes: Those of each process, shape ``(processes, stages, 5)``.

        Raises:
            ValueError: If a target of any process was wrong.
        """
        ranks, by_stage = len(notes), notes.transpose(0, 1).tolist()
        for stage, of_ranks in zip(STAGES, by_stage, strict=True):
            total = sum(int(batches) for batches, *_ in of_ranks)
            for rank, (batches, batch_idx, dataloader_idx, low, high) in enumerate(of_ranks):
                if batches:
                    self.clear()
                    place = _place(stage, int(batch_idx), int(dataloader_idx))
                    place += f" on rank {rank}" if ranks > 1 else ""
                    place += f" (one of {total} such batches)" if total > 1 else ""
                    raise ZNormValueError(self._message(low, high, place))

    def _bounds(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The least and the greatest target, NaN if one is NaN, and whether one is wrong."""
        values = orderable(targets.detach())
        low, high = values.aminmax()
        fits = (low >= 0) & (high <= self.last)  # which NaN makes false
        if self.only_whole and values.is_floating_point():
            fits = fits & (values == values.trunc()).all()
        return low, high, ~fits

    def _message(self, low: float, high: float, place: str) -> str:
        if math.isnan(low):
            return f"{self.name} hold NaN in {place}: correct them, or leave out what holds it."
        fractions = low >= 0 and high <= self.last
        found = "are not whole numbers" if fractions else f"run from {low:g} to {high:g}"
        numbers = "whole numbers from 0" if self.only_whole else "0"
        return f"{self.name} {found} in {place}, and {self.settings} allows {numbers} to {self.last}: {self.remedy}."


def _has_values(targets: Tensor) -> bool:
    return targets.dtype != torch.bool and targets.numel() > 0


def _place(stage: str, batch_idx: int, dataloader_idx: int) -> str:
    return f"batch {batch_idx} of {stage}" + (f" loader {dataloader_idx}" if dataloader_idx else "")


def _no_notes(device: torch.device) -> Tensor:
    return torch.zeros(5, dtype=widest_float(device), device=device)
