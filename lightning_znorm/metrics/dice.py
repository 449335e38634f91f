"""Dice score and Tversky index: how much two masks overlap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_znorm.errors import ZNormValueError
from lightning_znorm.metrics.mask_metric import Empty, MaskMetric, widest_float


class TverskyIndex(MaskMetric):
    r"""Tversky index of masks: an overlap score in which missed pixels may weigh more than false ones.

    With the numbers of pixels that are true positives (TP: in both masks), false positives (FP: predicted alone) and
    false negatives (FN: missed),

    .. math::
        S = \frac{\mathrm{TP}}{\mathrm{TP} + \alpha \, \mathrm{FP} + \beta \, \mathrm{FN}}

    so ``alpha`` weighs false positives and ``beta`` false negatives. With both 0.5 it is the Dice score, with both 1
    the Jaccard index, with 0 and 1 the recall, with 1 and 0 the precision.

    Each image and channel has an index of its own, and the result is their mean. With ``empty="skip"``, the default:

    - both masks empty: left out, and counted in ``metric.skipped``.
    - one empty: 0, by the definition (also with a weight of 0, where the definition gives 0 / 0).
    - all left out: NaN, with one warning.

    Source:
        Salehi et al. 2017, "Tversky loss function for image segmentation using 3D fully convolutional deep networks",
        arXiv 1706.05721.

    Args:
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty mask means. ``"skip"``: as above. ``"best"``: two empty masks count as a score of 1, as in
            MONAI's ``DiceMetric(ignore_empty=False)``. ``"skip_true"``: every mask whose truth is empty is left out, as
            with ``ignore_empty=True``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Attributes:
        counted: Number of masks in the mean, in this process.
        skipped: Number of masks left out, in this process.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), a weight is negative or not finite, both are 0, or ``empty`` is
            another word.

    Shape:
        ``preds``, probabilities or bool, and ``target``, bool or integers 0 and 1: ``(N, C, H, W)`` or
        ``(N, C, D, H, W)`` both. The result is a scalar.

    Example:
        >>> preds = torch.tensor([[[[0.9, 0.8], [0.7, 0.1]]]])
        >>> target = torch.tensor([[[[1, 1], [0, 0]]]])
        >>> metric = TverskyIndex()
        >>> metric(preds, target)  # 2 / (2 + 0.3 * 1 + 0.7 * 0)
        tensor(0.8696)
        >>> metric.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.bool))
        >>> metric.compute(), metric.skipped
        (tensor(0.8696), tensor(1))
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(
        self, alpha: float = 0.3, beta: float = 0.7, threshold: float = 0.5, empty: Empty = "skip", **kwargs: Any
    ) -> None:
        if not (0 <= alpha < float("inf") and 0 <= beta < float("inf") and alpha + beta > 0):
            raise ZNormValueError(f"alpha and beta are weights, at least one of them above 0, got {alpha} and {beta}.")
        super().__init__(threshold, (alpha, beta), empty, **kwargs)
        self.alpha = alpha
        self.beta = beta

    @override
    def worst(self, size: Sequence[int]) -> float:
        return 0.0

    @override
    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        overlap = _sizes(preds & target)
        weighted = self.alpha * (_sizes(preds) - overlap) + self.beta * (_sizes(target) - overlap)
        return torch.where(overlap > 0, overlap / (overlap + weighted), 0.0)


class DiceScore(MaskMetric):
    r"""Dice score of masks, which is the F1 score of their pixels.

    For the sets of predicted pixels :math:`P` and true pixels :math:`G`,

    .. math::
        D(P, G) = \frac{2 |P \cap G|}{|P| + |G|}

    Each image and channel has a score of its own, and the result is their mean. With ``empty="skip"``, the default:

    - both masks empty: left out, and counted in ``metric.skipped``.
    - one empty: 0.
    - all left out: NaN, with one warning.

    torchmetrics' ``DiceScore`` differs in two ways. Its memory grows with the data, and its masks have different
    weights, because it takes the mean over the channels of each image first.

    MONAI's ``DiceMetric`` leaves out every mask whose truth is empty, whatever was predicted for it. In a case of its
    own tests (six predicted masks, of which four have an empty truth) it gives 0.857, and this score 0.286. With
    ``ignore_empty=False`` it gives 0.286 too, but masks that are empty in both get a score of 1. To have MONAI's
    numbers, choose ``empty="skip_true"`` and ``empty="best"``.

    Source:
        Dice 1945, "Measures of the amount of ecologic association between species".

    Args:
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty mask means. ``"skip"``: as above. ``"best"``: two empty masks count as a score of 1, as in
            MONAI's ``DiceMetric(ignore_empty=False)``. ``"skip_true"``: every mask whose truth is empty is left out, as
            with ``ignore_empty=True``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Attributes:
        counted: Number of masks in the mean, in this process.
        skipped: Number of masks left out, in this process.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), or ``empty`` is another word.

    Shape:
        ``preds``, probabilities or bool, and ``target``, bool or integers 0 and 1: ``(N, C, H, W)`` or
        ``(N, C, D, H, W)`` both. The result is a scalar.

    Example:
        >>> preds = torch.tensor([[[[0.9, 0.8], [0.7, 0.1]]]])
        >>> target = torch.tensor([[[[1, 1], [0, 0]]]])
        >>> metric = DiceScore()
        >>> metric(preds, target)  # 2 * 2 / (3 + 2)
        tensor(0.8000)
        >>> metric.update(torch.zeros(1, 1, 2, 2), target)  # misses it: 0
        >>> metric.compute(), metric.counted
        (tensor(0.4000), tensor(2))
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, threshold: float = 0.5, empty: Empty = "skip", **kwargs: Any) -> None:
        super().__init__(threshold, empty=empty, **kwargs)

    @override
    def worst(self, size: Sequence[int]) -> float:
        return 0.0

    @override
    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        return 2 * _sizes(preds & target) / (_sizes(preds) + _sizes(target))


def _sizes(masks: Tensor) -> Tensor:
    # A quotient of integers would have torch's default dtype, and float16 ends at 65504 pixels.
    return masks.flatten(1).sum(dim=1).to(widest_float(masks.device))
