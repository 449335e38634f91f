"""Sums of many pieces of a vector, such as small gradients: in few launches, and always in the same order.

Pieces are cut into parts of one length, so that each part is a row of a matrix, and each piece a row of a table of
parts. ``index_add_`` would be simpler. But on CUDA its order differs from call to call, and so would the replicas of
DDP, each of which transforms the same gradients by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.caches import kept_on_device
from lightning_znorm.gradients.kernels.memory import UPCAST

# Widths of layers mostly are multiples of it.
PART = 64


def num_parts(numel: int) -> int:
    """Return the number of parts that a piece is cut into."""
    return -(-numel // PART)


class _PartTable:
    """Which parts are of which piece. One more part, the last, is zero and of no piece.

    Args:
        numels: Numbers of elements of the pieces.
        device: Where they are.

    Attributes:
        owners: For each part, the index of its piece. The last part has an owner of its own, so that inf and NaN of a
            piece do not get into its zeros.
        is_element: For each element of each part, whether it is one of a piece, and no padding.
    """

    def __init__(self, numels: Sequence[int], device: torch.device) -> None:
        numbers = list(map(num_parts, numels))
        owners = torch.arange(len(numels) + 1).repeat_interleave(
            torch.tensor([*numbers, 1]), output_size=sum(numbers) + 1
        )
        first = torch.tensor([0, *numbers]).cumsum(0)
        columns = torch.arange(max(numbers))
        parts = first.unsqueeze(1) + columns
        parts = parts.where(columns < torch.tensor([*numbers, 0]).unsqueeze(1), sum(numbers))
        begins = PART * (torch.arange(len(owners)) - first[owners])
        numel = torch.tensor([*numels, 0])[owners]
        self.owners = owners.to(device, torch.int32)
        self.is_element = (torch.arange(PART) < (numel - begins).unsqueeze(1)).to(device)
        self._parts = parts.flatten().to(device, torch.int32)
        self._num_sums = len(numels) + 1

    def sums(self, matrix: Tensor) -> Tensor:
        """Return the sums of all parts of each piece, and a last one, of the zeros."""
        of_parts = matrix.sum(1).index_select(0, self._parts)
        return of_parts.view(self._num_sums, -1, *matrix.shape[2:]).sum(1)


class Parts(_PartTable):
    """Small gradients as a matrix of parts.

    Args:
        numels: Numbers of elements of the gradients.
        dtype: Their type.
        device: Where they are.
    """

    def __init__(self, numels: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(numels, device)
        self._padding = [PART * num_parts(numel) - numel for numel in numels]
        self._zeros = torch.zeros(PART, dtype=dtype).to(device)
        wide = UPCAST.get(dtype, dtype).to_real()
        self._count = torch.tensor([*numels, 1], dtype=wide).to(device)
        self._zero_means = torch.zeros(len(numels), dtype=wide).to(device)

    def padded(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return what to concatenate: other gradients, which come first, and those of the parts with their padding."""
        num_others = len(gradients) - len(self._padding)
        pieces = list(gradients[:num_others])
        for gradient, padding in zip(gradients[num_others:], self._padding, strict=True):
            pieces += (gradient, self._zeros[:padding]) if padding else (gradient,)
        return [*pieces, self._zeros]

    def without_padding(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of such pieces."""
        num_padding = sum(map(bool, self._padding)) + 1
        num_others = len(pieces) - len(self._padding) - num_padding
        gradients, padded = list(pieces[:num_others]), iter(pieces[num_others:])
        for padding in self._padding:
            gradients.append(next(padded))
            if padding:
                next(padded)
        return gradients

    def measure(self, parts: Tensor, needs_std: bool, from_zero: bool) -> tuple[Tensor, Tensor]:
        """Return the means and the squared deviations, of shape ``(S,)``, or ``(S, 2)`` of complex gradients.

        Args:
            parts: The matrix.
            needs_std: Whether the squared deviations are needed.
            from_zero: Whether the means are given as zero.
        """
        count, is_element, zero_means = self._count, self.is_element, self._zero_means
        if parts.is_complex():
            parts = torch.view_as_real(parts)
            count, is_element, zero_means = (numbers.unsqueeze(-1) for numbers in (count, is_element, zero_means))
        if from_zero:
            squares = self.sums(parts.square())[:-1]
            return zero_means.expand_as(squares), squares
        means = self.sums(parts) / count
        if not needs_std:
            return means[:-1], means[:0]
        differences = torch.addcmul(parts, is_element, means.index_select(0, self.owners).unsqueeze(1), value=-1)
        return means[:-1], self.sums(differences.square_())[:-1]

    def of_gradients(self, numbers: Tensor | None) -> Tensor | None:
        """Return, for each part but the last, the number of its gradient."""
        return None if numbers is None else numbers.index_select(0, self.owners[:-1])


parts_of = kept_on_device(maxsize=64)(Parts)


def sums_of_pieces(vector: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return the sums of consecutive pieces of a vector, of these lengths."""
    table, places, zero = _pieces(lengths, vector.dtype, vector.device)
    matrix = torch.cat([vector, zero]).index_select(0, places).view(-1, PART)
    return table.sums(matrix)[:-1]


@kept_on_device(maxsize=64)
def _pieces(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[_PartTable, Tensor, Tensor]:
    """Return a table of parts, the index in the vector of each of their elements, and the zero after its end."""
    table = _PartTable(lengths, device)
    total = sum(lengths)
    # Parts end with padding, and the last part is nothing else.
    numbers = list(map(num_parts, lengths))
    starts = PART * torch.tensor([0, *numbers]).cumsum(0)
    places = torch.full((PART * (sum(numbers) + 1),), total)
    pieces = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths), output_size=total)
    begins = torch.tensor([0, *lengths]).cumsum(0)
    places[starts[pieces] + torch.arange(total) - begins[pieces]] = torch.arange(total)
    return table, places.to(device, torch.int32), torch.zeros(1, dtype=dtype).to(device)
