"""Memory that a kernel transforms."""

from typing import NamedTuple

from torch import Tensor


class Piece(NamedTuple):
    """Memory to transform, with as many entries of statistics as it has tensors or rows: one, or one for each row."""

    tensor: Tensor
    """Dense and not empty, of any shape and strides."""
    by_row: bool = False
    """Whether each index of the first dimension is transformed on its own, or the whole at once."""
    start: int = 0
    """Number of its first entry, where several pieces contribute to a common table."""

    @property
    def entries(self) -> int:
        """Number of entries of statistics."""
        return len(self.tensor) if self.by_row else 1
