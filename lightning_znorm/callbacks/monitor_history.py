"""What GradientMonitor remembers of gradients over the steps of a training, in bounded memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Weight of the past in the running mean, which then spans about ten measurements.
_DECAY = 0.9

_QUANTITIES = ("sigma", "cosine", "relative_size")


class GradientHistory:
    """Remember the deviation of each parameter's gradient, what ZNorm would change, and the share of the mean.

    When there are too many steps, every two neighbours become one: the earlier one is kept, and what is not finite in
    either of them. So the kept steps stay equally far apart in a training of any length.

    Args:
        max_steps: The largest number of steps to keep, an even number.

    Attributes:
        names: Names of the parameters, in the order in which they were added.
        ndims: Numbers of dimensions of the parameters.
        steps: Numbers of the kept steps.
    """

    def __init__(self, max_steps: int = 512) -> None:
        self.max_steps = max_steps
        self.names: list[str] = []
        self.ndims: list[int] = []
        self.steps: list[int] = []
        self._rows: dict[str, int] = {}
        self._columns: list[Tensor] = []  # of each step the quantities below, shape (quantities, names)
        self._stride, self._seen, self._last = 1, 0, -1
        # Sum of weighted deviations, and of the weights.
        self._sums = self._weights = torch.zeros(0, dtype=torch.float64)
        # Sum of the shares of the mean in the squared gradient, their number, and that of the elements that tell them.
        self._share_sums = self._share_counts = self._told_by = torch.zeros(0, dtype=torch.float64)

    @property
    def sigma(self) -> Tensor:
        """Deviations, shape ``(names, steps)``: inf where a gradient was not finite, NaN where there was none."""
        return self._kept("sigma")

    @property
    def cosine(self) -> Tensor:
        """Cosines of gradients and their z-scores, shape ``(names, steps)``: NaN where there was none."""
        return self._kept("cosine")

    @property
    def relative_size(self) -> Tensor:
        """By how much more ZNorm enlarges a gradient than all of them together, ``(names, steps)``: NaN as above."""
        return self._kept("relative_size")

    def _kept(self, quantity: str) -> Tensor:
        if not self.steps:
            return torch.zeros(0, 0, dtype=torch.float32)
        size, number = len(self.names), _QUANTITIES.index(quantity)
        return torch.stack([_grown(column[number], size, torch.nan) for column in self._columns], dim=1)

    @property
    def mean_share(self) -> Tensor:
        """Share of the mean in the squared gradient, mean over all steps, ``(names,)``: NaN if it was never known."""
        size = len(self.names)
        return _grown(self._share_sums, size, 0.0) / _grown(self._share_counts, size, 0.0)

    @property
    def num_steps(self) -> int:
        """How many steps have been measured, also those that are no longer kept."""
        return self._seen

    def trusted_shares(self, least: int) -> Tensor:
        """Return :attr:`mean_share`, and NaN where it may be a matter of luck, shape ``(names,)``.

        Of gradients of two elements without a direction, one in five has a mean that holds more than 0.9.

        Args:
            least: Number of elements, summed over the measurements of a parameter and without one for each of them,
                that make its share trusted.
        """
        return self.mean_share.masked_fill(_grown(self._told_by, len(self.names), 0.0) < least, torch.nan)

    def add_shares(self, rows: Sequence[int], mean_share: Tensor, count: Tensor) -> None:
        """Add the shares of the mean at a step, of which those that are NaN do not enter the means.

        Args:
            rows: Numbers of the parameters.
            mean_share: Share of the mean in the squared gradient of each, shape ``(rows,)``.
            count: Number of elements of each, shape ``(rows,)``.
        """
        size, index, is_known = len(self.names), torch.tensor(rows, dtype=torch.int64), ~mean_share.isnan()
        self._share_sums, self._share_counts, self._told_by = (
            _grown(old, size, 0.0).index_add(0, index, new.double())
            for old, new in (
                (self._share_sums, mean_share.nan_to_num(0.0)),
                (self._share_counts, is_known),
                (self._told_by, (count - 1) * is_known),
            )
        )

    def register(self, name: str, ndim: int) -> int:
        """Add a parameter, if it is new, and return its number."""
        if name not in self._rows:
            self._rows[name] = len(self.names)
            self.names.append(name)
            self.ndims.append(ndim)
        return self._rows[name]

    def add(
        self,
        step: int,
        rows: Sequence[int],
        sigma: Tensor,
        is_finite: Tensor,
        cosine: Tensor | None = None,
        relative_size: Tensor | None = None,
    ) -> Tensor:
        """Remember the deviations of a step, and what ZNorm would change.

        Args:
            step: Number of the step. Several calls with the same number share a column.
            rows: Numbers of the parameters.
            sigma: Deviations of their gradients, shape ``(rows,)``.
            is_finite: Whether each gradient is finite. One that is not does not enter the running mean.
            cosine: Cosines of the gradients and their z-scores, shape ``(rows,)``; ``None`` if they are not known.
            relative_size: By how much more ZNorm enlarges each than all of them together, shape ``(rows,)``, or
                ``None``.

        Returns:
            Deviations over the running means of the steps before, shape ``(rows,)``; 1 where there are none.
        """
        size, index = len(self.names), torch.tensor(rows, dtype=torch.int64)
        self._sums, self._weights = _grown(self._sums, size, 0.0), _grown(self._weights, size, 0.0)
        sums, weights = self._sums[index], self._weights[index]
        ratio = torch.where(
            weights > 0, sigma * weights / sums, torch.ones_like(sums).masked_fill(~is_finite, torch.nan)
        )
        self._sums[index] = torch.where(is_finite, _DECAY * sums + (1 - _DECAY) * sigma, sums)
        self._weights[index] = torch.where(is_finite, _DECAY * weights + (1 - _DECAY), weights)
        column = torch.full((len(_QUANTITIES), size), torch.nan, dtype=torch.float32)
        column[0, index] = sigma.masked_fill(~is_finite, torch.inf).float()
        for number, values in enumerate((cosine, relative_size), 1):
            if values is not None:
                column[number, index] = values.masked_fill(~is_finite, torch.nan).float()
        self._put(step, column)
        return ratio

    def _put(self, step: int, column: Tensor) -> None:
        if step != self._last:
            self._seen, self._last = self._seen + 1, step
        number = (self._seen - 1) // self._stride
        if number < len(self._columns):
            if self.steps[-1] == step:  # another optimizer has measured the same step
                old = _grown(self._columns[-1], column.shape[1], torch.nan)
                self._columns[-1] = torch.where(column.isnan(), old, column)
            else:
                self._columns[-1] = _merged(self._columns[-1], column)
            return
        self.steps.append(step)
        self._columns.append(column)
        if len(self.steps) > self.max_steps:
            pairs = zip(self._columns[::2], [*self._columns[1::2], column], strict=False)
            self._columns = [_merged(first, second) for first, second in pairs]
            self.steps = self.steps[::2]
            self._stride *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return the whole history, as lists and tensors."""
        return {
            "names": list(self.names),
            "ndims": list(self.ndims),
            "steps": list(self.steps),
            **{quantity: self._kept(quantity) for quantity in _QUANTITIES},
            "sums": self._sums.clone(),
            "weights": self._weights.clone(),
            "counters": [self._stride, self._seen, self._last],
            "share_sums": self._share_sums.clone(),
            "share_counts": self._share_counts.clone(),
            "shares_told_by": self._told_by.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.names, self.ndims, self.steps = list(state["names"]), list(state["ndims"]), list(state["steps"])
        self._rows = {name: row for row, name in enumerate(self.names)}
        unknown = torch.full_like(state["sigma"], torch.nan)  # older checkpoints hold the deviations alone
        kept = torch.stack([state.get(quantity, unknown) for quantity in _QUANTITIES])
        self._columns = [column.clone() for column in kept.unbind(2)] if self.steps else []
        self._sums, self._weights = state["sums"].clone(), state["weights"].clone()
        self._stride, self._seen, self._last = state["counters"]
        none = torch.zeros(0, dtype=torch.float64)  # older checkpoints hold no shares
        self._share_sums, self._share_counts, self._told_by = (
            state.get(key, none).clone() for key in ("share_sums", "share_counts", "shares_told_by")
        )


def _grown(column: Tensor, size: int, value: float) -> Tensor:
    """Return a column with a value for each parameter that came after it. Parameters are its last dimension."""
    return torch.cat([column, column.new_full((*column.shape[:-1], size - column.shape[-1]), value)], dim=-1)


def _merged(first: Tensor, second: Tensor) -> Tensor:
    """Return the first column, with what is missing in it or infinite in the second taken from the second."""
    first = _grown(first, second.shape[-1], torch.nan)
    return torch.where(second.isinf() | first.isnan(), second, first)
