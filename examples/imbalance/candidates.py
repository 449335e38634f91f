"""Adaptive centring by row, the second candidate: each output channel keeps as much of its mean as is its signal."""

import torch
from torch import Tensor

from lightning_znorm.gradients import AffineMethod, Statistics


class AdaptiveRows(AffineMethod):
    r"""Adaptive centring with the mean of each row (output channel), and the deviation of all rows together.

    .. math:: z_i = \frac{g_i - r_i\mu_i}{\sqrt{\sigma^2 + (1 - r_i)^2\mu_i^2}}, \qquad
        r_i = \frac{\sigma^2}{\sigma^2 + \mu_i^2}

    where :math:`\sigma^2` is the mean of the squared deviations of all elements from the means of their rows. A vector
    has no rows: it is divided by its root mean square.
    """

    over = "row"
    std_over = "tensor"

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        """Return the shift and scale of each row."""
        std, mean = stats.std, stats.mean.abs()
        size = torch.hypot(std, mean)
        kept = (mean / size).square()
        is_zero = size == 0
        scale = torch.hypot(std, kept * mean).reciprocal().masked_fill(is_zero, 0.0)
        return ((1 - kept) * stats.mean).masked_fill(is_zero, 0.0), scale
