"""Exact Hausdorff distances between masks, on the CPU and on a GPU.

MONAI and torchmetrics only take distances between surfaces. torchmetrics fails on empty masks, and holds the distances
of all pairs of pixels in memory. MONAI's distance transform needs cuCIM on a GPU.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Mask: TypeAlias = npt.NDArray[np.bool_]

_CHUNK = 2**24  # sums held at once in `_squared_distances`: 64 MiB


def hausdorff_distances(
    preds: Tensor, target: Tensor, spacing: Sequence[float], percentile: float | None = None
) -> Tensor:
    """Return the Hausdorff distance of each pair of masks.

    Args:
        preds: Shape ``(M, H, W)`` or ``(M, D, H, W)``, bool.
        target: Of the same shape and dtype.
        spacing: Distance of neighbouring pixels along each axis.
        percentile: Of the distances between surfaces. By default the largest distance over all pixels.

    Returns:
        Shape ``(M,)``, float32. If a mask is empty, any number.
    """
    # SciPy's transform takes time linear in the number of pixels; ours takes more, but runs batched on the device. MPS
    # shares its memory with the CPU, and has no float64.
    if preds.device.type not in ("cpu", "mps"):
        return hausdorff_distances_on_device(preds, target, spacing, percentile)
    pairs = zip(preds.cpu().numpy(), target.cpu().numpy(), strict=True)
    distances = [_hausdorff_distance(*pair, spacing, percentile) for pair in pairs]
    return torch.tensor(distances, dtype=torch.float32, device=preds.device)


def _hausdorff_distance(preds: Mask, target: Mask, spacing: Sequence[float], percentile: float | None) -> float:
    from scipy.ndimage import binary_erosion

    if not (preds.any() and target.any()):
        return 0.0
    box = _bounding_box(preds | target)
    preds, target = preds[box], target[box]
    if percentile is None:
        # Pixels in both masks have distance 0.
        forward, backward = _distances(preds & ~target, target, spacing), _distances(target & ~preds, preds, spacing)
        return float(max(forward.max(initial=0), backward.max(initial=0)))
    preds, target = preds & ~binary_erosion(preds), target & ~binary_erosion(target)
    forward, backward = _distances(preds, target, spacing), _distances(target, preds, spacing)
    return float(max(np.percentile(forward, percentile), np.percentile(backward, percentile)))


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        marked = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(marked[0], marked[-1] + 1))
    return tuple(box)


def _distances(points: Mask, mask: Mask, spacing: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the distance of each of the points from the nearest pixel of the mask."""
    from scipy.ndimage import distance_transform_edt

    where = np.nonzero(points)
    if len(where[0]) == 0:
        return np.zeros(0)
    # Only the distances at the points: SciPy's distances of all pixels take several times the memory.
    nearest: Any = distance_transform_edt(~mask, sampling=spacing, return_distances=False, return_indices=True)
    squared = np.zeros(len(where[0]))
    for position, nearest_position, step in zip(where, nearest, spacing, strict=True):
        squared += ((position - nearest_position[where]) * step) ** 2
    return np.sqrt(squared)


def hausdorff_distances_on_device(
    preds: Tensor, target: Tensor, spacing: Sequence[float], percentile: float | None = None
) -> Tensor:
    """Return what `hausdorff_distances` does, in torch only: all masks at once, without waiting for the device."""
    if preds.numel() == 0:
        return torch.zeros(len(preds), dtype=torch.float32, device=preds.device)
    if percentile is not None:
        preds, target = _surface(preds), _surface(target)
    forward = _squared_distances(target, spacing).flatten(1)
    backward = _squared_distances(preds, spacing).flatten(1)
    preds, target = preds.flatten(1), target.flatten(1)
    if percentile is None:
        furthest = torch.maximum(
            torch.where(preds, forward, 0.0).amax(dim=1),
            torch.where(target, backward, 0.0).amax(dim=1),
        )
        return furthest.sqrt()
    return torch.maximum(
        _percentile(forward.sqrt(), preds, percentile),
        _percentile(backward.sqrt(), target, percentile),
    )


def _surface(masks: Tensor) -> Tensor:
    """Return the pixels of each mask with a side neighbour outside of it, or at the image's edge."""
    inside = masks
    for dim in range(1, masks.ndim):
        edge = torch.zeros_like(masks.narrow(dim, 0, 1))
        before = torch.cat([edge, masks.narrow(dim, 0, masks.shape[dim] - 1)], dim)
        after = torch.cat([masks.narrow(dim, 1, masks.shape[dim] - 1), edge], dim)
        inside = inside & before & after
    return masks & ~inside


def _squared_distances(masks: Tensor, spacing: Sequence[float]) -> Tensor:
    """Return the squared distance of each pixel from the nearest pixel of its mask; infinite if the mask is empty.

    The squared distance is a sum over the axes, so its minimum may be taken one axis after the other. For each pixel of
    a row, it is the minimum, over the row, of the minima so far plus the squared distances along the row.
    """
    squared = torch.zeros(masks.shape, dtype=torch.float32, device=masks.device).masked_fill_(~masks, torch.inf)
    for axis, step in enumerate(spacing, start=1):
        n = masks.shape[axis]
        position = torch.arange(n, dtype=torch.float32, device=masks.device)
        # The difference comes first, because that of whole numbers is exact.
        along = ((position.unsqueeze(1) - position) * step).square()
        rows = squared.movedim(axis, -1)
        shape = rows.shape
        chunks = torch.split(rows.reshape(-1, n), max(1, _CHUNK // n**2))
        squared = torch.cat([(chunk.unsqueeze(1) + along).amin(dim=-1) for chunk in chunks])
        squared = squared.view(shape).movedim(-1, axis)
    return squared


def _percentile(distances: Tensor, points: Tensor, percentile: float) -> Tensor:
    """Return the percentile of each row's distances at its points, interpolated linearly as `numpy.percentile` does.

    `torch.quantile` has no mask, and takes at most 16 million elements.
    """
    # If there are no points, or infinite distances, MaskMetric replaces the result.
    in_order = distances.masked_fill(~points, torch.inf).sort(dim=1).values
    position = (points.sum(dim=1, keepdim=True) - 1).clamp_min(0).double() * (percentile / 100)
    lower = in_order.gather(1, position.floor().long())
    upper = in_order.gather(1, position.ceil().long())
    return torch.lerp(lower, upper, position.frac().float()).squeeze(1)
