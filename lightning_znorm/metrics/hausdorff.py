"""Hausdorff distance between two masks."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_znorm.errors import ZNormValueError
from lightning_znorm.metrics.distances import hausdorff_distances
from lightning_znorm.metrics.mask_metric import MaskMetric


class HausdorffDistance(MaskMetric):
    r"""Hausdorff distance of masks: the largest distance of a pixel of one mask from the other mask.

    For the sets of predicted pixels :math:`A` and true pixels :math:`B`, with the Euclidean distance,

    .. math::
        H(A, B) = \max \left( \max_{a \in A} \min_{b \in B} |a - b|, \max_{b \in B} \min_{a \in A} |a - b| \right)

    over all pixels of both masks, so that a filled hole counts. MONAI and torchmetrics only take the pixels of the
    surfaces, and a filled hole is nearer to those.

    One stray pixel decides this distance. Therefore ``percentile=95``, known as HD95, is common. It is taken over the
    pixels of the surfaces (those with a side neighbour outside of the mask, or at the image's edge). The distances from
    the first surface to the second have a 95th percentile (interpolated linearly), and so have those from the second to
    the first; HD95 is the larger one. It equals MONAI's ``compute_hausdorff_distance``. ``percentile=100`` is the
    Hausdorff distance of the surfaces.

    medpy's ``hd95`` is another number: one percentile of the distances of both directions together. For a prediction
    that has the true square of 20x20 pixels, and a false spot of 3x3 pixels 20 rows and 20 columns away from it, HD95
    is 31.04 here and in MONAI, and 1.48 in medpy.

    Each image and channel has a distance of its own, and the result is their mean:

    - both masks empty: left out, and counted in ``metric.skipped``.
    - one empty: the diagonal of the image, which is the distance between the centres of its opposite corner pixels, in
      the units of ``spacing``. It is the largest distance that two masks can have.
    - all left out: NaN, with one warning.

    Distances are exact. On the CPU they come from SciPy's distance transform. On a GPU they are computed there, in a
    time that grows with the number of pixels times the side length. Memory grows with the number of pixels, and does
    not depend on the masks.

    Source:
        Equation 12 of Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215. Percentiles: Huttenlocher et al.
        1993, "Comparing images using the Hausdorff distance"; over surfaces as in MONAI.

    Args:
        percentile: Of the distances between surfaces, in (0, 100]. By default the largest distance over all pixels.
        spacing: Distance of neighbouring pixels along each axis, in the order of the masks' axes, or one number for all
            axes; 1 by default.
        threshold: Smallest probability of a pixel in the predicted mask.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Attributes:
        counted: Number of masks in the mean, in this process.
        skipped: Number of masks left out, in this process.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), ``percentile`` is not in (0, 100], or a ``spacing`` is not a
            positive number; in ``update``, if there is not one spacing for each axis.

    Shape:
        ``preds``, probabilities or bool, and ``target``, bool or integers 0 and 1: ``(N, C, H, W)`` or
        ``(N, C, D, H, W)`` both. The result is a scalar.

    Example:
        >>> import torch
        >>> preds, target = torch.zeros(2, 1, 1, 8, 8, dtype=torch.bool)
        >>> target[..., 1:4, 1:4] = True
        >>> preds[..., 1:4, 1:4] = True
        >>> preds[..., 5, 7] = True  # the nearest true pixel is (3, 3)
        >>> HausdorffDistance()(preds, target)
        tensor(4.4721)
        >>> HausdorffDistance(spacing=(2.0, 0.5))(preds, target)
        tensor(4.4721)
        >>> HausdorffDistance()(torch.zeros_like(preds), target)  # the diagonal, from (0, 0) to (7, 7)
        tensor(9.8995)
        >>> HausdorffDistance(percentile=50)(preds, target)
        tensor(0.)
    """

    higher_is_better = False

    def __init__(
        self,
        percentile: float | None = None,
        spacing: float | Sequence[float] | None = None,
        threshold: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if percentile is not None and not 0 < percentile <= 100:
            raise ZNormValueError(f"percentile must be in (0, 100], or None for all pixels, got {percentile}.")
        steps = None if spacing is None else (spacing,) if isinstance(spacing, int | float) else tuple(spacing)
        if steps is not None and not all(0 < step < math.inf for step in steps):
            raise ZNormValueError(f"spacing must be positive, got {spacing}.")
        super().__init__(threshold, (percentile, steps), **kwargs)
        self.percentile = percentile
        self.spacing = spacing

    @override
    def worst(self, size: Sequence[int]) -> float:
        return math.hypot(*(max(0, n - 1) * step for n, step in zip(size, self._steps(len(size)), strict=True)))

    @override
    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        return hausdorff_distances(preds, target, self._steps(preds.ndim - 1), self.percentile)

    def _steps(self, axes: int) -> tuple[float, ...]:
        spacing = 1.0 if self.spacing is None else self.spacing
        steps = (spacing,) * axes if isinstance(spacing, int | float) else tuple(spacing)
        if len(steps) != axes:
            raise ZNormValueError(
                f"spacing has {len(steps)} numbers, and these masks have {axes} axes: give one number for each axis, "
                f"in the order {'D, H, W' if axes == 3 else 'H, W'}."
            )
        return steps
