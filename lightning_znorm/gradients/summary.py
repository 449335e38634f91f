"""What the statistics of gradients say of them, and of what ZNorm makes of them."""

import torch
from torch import Tensor

from lightning_znorm.gradients.statistics import Statistics


class GradientSummary:
    r"""Numbers that follow from count, mean and deviation of each of some gradients.

    .. math::
        \lVert g \rVert = \sqrt{n (\sigma^2 + |\mu|^2)} \qquad
        \lVert z \rVert = \sqrt{n} \frac{\sigma}{\sigma + \epsilon} \qquad
        \cos(g, z) = \frac{\sigma}{\sqrt{\sigma^2 + |\mu|^2}}

    because :math:`\langle g, z \rangle = n \sigma^2 / (\sigma + \epsilon)` for a z-scored gradient z (Yun, "ZNorm:
    Z-Score Gradient Normalization", arXiv 2408.01215, Theorem 4.2).

    Args:
        stats: Statistics, each entry that of one gradient.
        eps: That of ZNorm.

    Attributes:
        count: Number of elements.
        mean: Arithmetic mean.
        sigma: Population standard deviation; zero where it is within the rounding of the mean, NaN where the squared
            deviations overflow.
        norm: Euclidean norm.
        znorm_norm: That of the z-scored gradient; a single element stays as it is.
        cosine: That of the angle between the gradient and the z-scored one; NaN for a gradient of zero.
        has_deviation: Whether it has several elements.
        is_finite: Whether it holds no inf and no NaN, and its squared deviations do not overflow.

    Example:
        >>> import torch
        >>> from lightning_znorm.gradients import Statistics
        >>> from lightning_znorm.gradients.summary import GradientSummary
        >>> of_7_and_1 = Statistics(torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([18.0]))
        >>> summary = GradientSummary(of_7_and_1)
        >>> summary.sigma, summary.norm**2, summary.cosine
        (tensor([3.]), tensor([50.]), tensor([0.6000]))
    """

    def __init__(self, stats: Statistics, eps: float = 1e-10) -> None:
        self.count, self.mean, self.sigma = stats.count, stats.mean, stats.std
        size = torch.hypot(self.sigma, self.mean.abs())
        self.norm = self.count.sqrt() * size
        self.has_deviation = self.count > 1
        z = (self.sigma / (self.sigma + eps)).masked_fill(self.sigma == 0, 0.0)
        self.znorm_norm = torch.where(self.has_deviation, self.count.sqrt() * z, self.norm)
        self.cosine = torch.where(self.has_deviation, self.sigma / size, size / size)
        self.is_finite: Tensor = size.isfinite()
