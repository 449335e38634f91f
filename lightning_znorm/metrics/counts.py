"""How many masks a score counts, and how many it leaves out, as metrics that can be logged."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_znorm.metrics.mask_metric import Empty, MetricOfMasks, not_empty


class MaskCount(MetricOfMasks):
    """Number of masks that a score counts, or leaves out because they are empty.

    It is what ``metric.counted`` and ``metric.skipped`` of a score such as `DiceScore` with the same ``threshold`` and
    ``empty`` give, over all processes.

    Args:
        left_out: Whether to count the masks that are left out instead.
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty mask means, as in `DiceScore`: ``"skip"``, ``"best"`` or ``"skip_true"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is not in (0, 1), or ``empty`` is another word.

    Shape:
        ``preds``, probabilities or bool, and ``target``, bool or integers 0 and 1: ``(N, C, H, W)`` or
        ``(N, C, D, H, W)`` both. The result is a scalar, float32.

    Example:
        >>> preds = torch.tensor([[[[0.9, 0.8]], [[0.1, 0.2]]]])  # one image, two channels: the second is empty
        >>> target = torch.tensor([[[[1, 0]], [[0, 0]]]])
        >>> MaskCount()(preds, target), MaskCount(left_out=True)(preds, target)
        (tensor(1.), tensor(1.))
    """

    def __init__(self, left_out: bool = False, threshold: float = 0.5, empty: Empty = "skip", **kwargs: Any) -> None:
        super().__init__(threshold, empty, **kwargs)
        self.left_out = left_out
        # In a compute group of a MetricCollection, counts of the same masks share one state.
        self._counts = f"counts of masks {(threshold, self.empty)}"
        # Masks counted, masks left out, batches with impossible values in preds, batches with such in target.
        self.add_state(self._counts, torch.tensor([0, 0, 0, 0], dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, preds: Tensor, target: Tensor, sizes: Tensor | None = None) -> None:
        """Count the masks of a batch.

        Args:
            preds: Probabilities or bool, shape ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
            target: Bool, or integers 0 and 1, of the same shape.
            sizes: What :func:`~lightning_znorm.metrics.mask_metric.sizes_of` returns for these masks, so that several
                metrics count their pixels once.

        Raises:
            TypeError: If ``preds`` are neither floating point nor bool, or ``target`` is neither bool nor integer.
            ValueError: If the shapes are none of these or differ, or on the CPU if a value is impossible.
        """
        preds, target, misfits = self.checked(preds, target)
        found = [not_empty(preds), not_empty(target)] if sizes is None else [sizes[1] > 0, sizes[2] > 0]
        counted = self.counts_in(*found)
        numbers = torch.cat([torch.stack([counted.sum(), (~counted).sum()]), misfits])
        setattr(self, self._counts, getattr(self, self._counts) + numbers)

    @override
    def compute(self) -> Tensor:
        """Return the number, in float32.

        Raises:
            ValueError: If ``preds`` or ``target`` had impossible values.
        """
        numbers: Tensor = getattr(self, self._counts)
        self.check_values(numbers[2:])
        return numbers[int(self.left_out)].float()
