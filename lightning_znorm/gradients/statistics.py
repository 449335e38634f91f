"""What a method may know of a gradient: the count, mean and squared deviation of a tensor or of its rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_znorm.errors import ZNormRuntimeError

# A deviation of fewer than this many rounding units of the mean is rounding. Summing a constant float32 tensor of up to
# 1e7 elements was measured to leave at most 4.9 of them.
ROUNDING_UNITS = 8


@dataclass(frozen=True)
class Statistics:
    """Statistics of one or more gradients, each entry that of one tensor, or of one row (first dimension) of a tensor.

    All tensors have the same one-dimensional shape ``(S,)``. They are in the precision of the computation: float32 for
    half-precision gradients, otherwise that of the gradients.

    Attributes:
        count: Number of elements behind each entry, as a floating-point tensor; behind ``m2`` where that is of several
            rows (:attr:`AffineMethod.pooled`).
        mean: Arithmetic mean of the elements; complex where the gradients are.
        m2: Sum of the squared deviations (of their magnitudes, where the gradients are complex) from the mean; ``None``
            where the method says that it does not need it (:attr:`AffineMethod.needs_std`).
    """

    count: Tensor
    mean: Tensor
    m2: Tensor | None

    @property
    def std(self) -> Tensor:
        """Population standard deviation ``sqrt(m2 / count)``, shape ``(S,)``, real.

        Zero where the deviation is within the rounding of the mean, so that a constant gradient is seen as one. NaN
        where the squared deviations overflow: an infinite deviation would otherwise silently become a scale of zero.
        """
        if self.m2 is None:
            raise ZNormRuntimeError("these statistics hold no deviation: set `needs_std = True` on the method")
        std = (self.m2 / self.count).sqrt_()
        rounding = ROUNDING_UNITS * torch.finfo(std.dtype).eps * self.mean.abs()
        return std.masked_fill_(std <= rounding, 0.0).masked_fill_(std.isinf(), torch.nan)
