"""Hausdorff distance between two masks."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_znorm.errors import ZNormValueError
from lightning_znorm.metrics.distances import hausdorff_distances
from lightning_znorm.metrics.mask_metric import Empty, MaskMetric
from lightning_znorm.requirements import require

_NEEDS_SPACING = "HausdorffDistance(spacing='image') needs the spacing of each image"


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

    Each image and channel has a distance of its own, and the result is their mean. With ``empty="skip"``, the default:

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
            axes; 1 by default. With ``"image"``, each image has a spacing of its own, which ``update`` takes.
        threshold: Smallest probability of a pixel in the predicted mask.
        empty: What an empty mask means. ``"skip"``: as above. ``"best"``: two empty masks count as a distance of 0.
            ``"skip_true"``: every mask whose truth is empty is left out.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Attributes:
        counted: Number of masks in the mean, in this process.
        skipped: Number of masks left out, in this process.

    Raises:
        ImportError: If SciPy is missing.
        ValueError: If ``threshold`` is not in (0, 1), ``percentile`` is not in (0, 100], a ``spacing`` is not a
            positive number, or ``empty`` is another word; in ``update``, if there is not one spacing for each axis, or
            with ``spacing="image"`` not one for each image.

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
        >>> HausdorffDistance(spacing="image")(preds, target, spacing=[(3.0, 0.5)])
        tensor(6.3246)
    """

    higher_is_better = False

    def __init__(
        self,
        percentile: float | None = None,
        spacing: float | Sequence[float] | Literal["image"] | None = None,
        threshold: float = 0.5,
        empty: Empty = "skip",
        **kwargs: Any,
    ) -> None:
        require(type(self).__name__, "scipy")
        if percentile is not None and not 0 < percentile <= 100:
            raise ZNormValueError(f"percentile must be in (0, 100], or None for all pixels, got {percentile}.")
        steps: Sequence[float] | str | None
        if isinstance(spacing, str):
            if spacing != "image":
                raise ZNormValueError(f"spacing must be numbers or 'image', got {spacing!r}.")
            steps = spacing
        else:
            steps = None if spacing is None else (spacing,) if isinstance(spacing, int | float) else tuple(spacing)
            _require_positive(steps or (), spacing)
        super().__init__(threshold, (percentile, steps), empty, **kwargs)
        self.percentile = percentile
        self.spacing = spacing

    @override
    def worst(self, size: Sequence[int]) -> float:
        return _diagonal(size, self._steps(len(size)))

    @override
    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        return hausdorff_distances(preds, target, self._steps(preds.ndim - 1), self.percentile)

    @override
    def scores_and_worst(
        self, preds: Tensor, target: Tensor, spacing: Sequence[Sequence[float] | None] | None
    ) -> tuple[Tensor, Tensor | float]:
        if self.spacing != "image":
            return super().scores_and_worst(preds, target, spacing)
        # Images of one spacing are scored together, which on a GPU takes far fewer kernels.
        images_of: dict[tuple[float, ...], list[int]] = {}
        for image, steps in enumerate(self._steps_of_images(spacing, len(preds), preds.ndim - 2)):
            images_of.setdefault(steps, []).append(image)
        scores, worst = preds.new_zeros(preds.shape[:2], dtype=torch.float32), [0.0] * len(preds)
        for steps, images in images_of.items():
            chosen = _on(preds.device, torch.tensor(images))
            ours, theirs = (masks.index_select(0, chosen).flatten(0, 1) for masks in (preds, target))
            distances = hausdorff_distances(ours, theirs, steps, self.percentile)
            scores = scores.index_copy(0, chosen, distances.view(len(images), preds.shape[1]))
            for image in images:
                worst[image] = _diagonal(preds.shape[2:], steps)
        return scores, _on(preds.device, torch.tensor(worst, dtype=torch.float32)).unsqueeze(1)

    def _steps(self, axes: int) -> tuple[float, ...]:
        if isinstance(self.spacing, str):
            raise ZNormValueError(f"{_NEEDS_SPACING}: call score_each or update with spacing.")
        spacing = 1.0 if self.spacing is None else self.spacing
        steps = (spacing,) * axes if isinstance(spacing, int | float) else tuple(spacing)
        _require_one_each(steps, axes)
        return steps

    def _steps_of_images(
        self, spacing: Sequence[Sequence[float] | None] | None, images: int, axes: int
    ) -> list[tuple[float, ...]]:
        how = (
            "pass spacing=[...] with a tuple of numbers for each image; in a batch, 'spacing' or 'affine' in the "
            "dictionary about the cases. Or give the metric one spacing for all images"
        )
        if spacing is None:
            raise ZNormValueError(f"{_NEEDS_SPACING}, and got none: {how}.")
        if len(spacing) != images:
            raise ZNormValueError(f"{_NEEDS_SPACING}, and got {len(spacing)} for {images} images: {how}.")
        found = []
        for image, each in enumerate(spacing):
            if each is None:
                raise ZNormValueError(f"{_NEEDS_SPACING}, and got none for image {image} of the batch: {how}.")
            steps = tuple(float(step) for step in each)
            _require_one_each(steps, axes)
            _require_positive(steps, steps)
            found.append(steps)
        return found


def _diagonal(size: Sequence[int], steps: Sequence[float]) -> float:
    return math.hypot(*(max(0, n - 1) * step for n, step in zip(size, steps, strict=True)))


def _on(device: torch.device, values: Tensor) -> Tensor:
    return values.to(device, non_blocking=True)  # a blocking copy would wait for all work of the device


def _require_positive(steps: Sequence[float], given: object) -> None:
    if not all(0 < step < math.inf for step in steps):
        raise ZNormValueError(f"spacing must be positive, got {given}.")


def _require_one_each(steps: Sequence[float], axes: int) -> None:
    if len(steps) != axes:
        raise ZNormValueError(
            f"spacing has {len(steps)} numbers, and these masks have {axes} axes: give one number for each axis, "
            f"in the order {'D, H, W' if axes == 3 else 'H, W'}."
        )
