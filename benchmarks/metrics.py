"""Time of the scores of masks beside torchmetrics', MONAI's and SciPy's: ``python -m benchmarks.metrics``.

Each row scores the same pairs of masks, once for each round, in which all rows take their turn; the value is the mean
over the pairs. "surfaces" are Hausdorff distances over the pixels of the surfaces only, which are other numbers than
those over all pixels. torchmetrics' is not run on noise: it holds the distances of all pairs of pixels.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torchmetrics.segmentation
from monai.metrics import DiceMetric, compute_hausdorff_distance
from scipy.spatial.distance import directed_hausdorff
from torch import Tensor

from benchmarks.timing import alternating_medians
from lightning_znorm.metrics import DiceScore, HausdorffDistance, TverskyIndex
from lightning_znorm.metrics.mask_metric import MaskMetric


def blobs(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Each mask is a union of three ellipses, a twentieth of the image."""
    pixels = torch.arange(size)
    mask = torch.zeros(count, 1, size, size, dtype=torch.bool)
    for _ in range(3):
        row, column = (torch.rand(2, count, 1, 1, 1, generator=generator) * 0.5 + 0.25) * size
        height, width = (torch.rand(2, count, 1, 1, 1, generator=generator) * 0.05 + 0.05) * size
        mask |= ((pixels.view(-1, 1) - row) / height) ** 2 + ((pixels - column) / width) ** 2 < 1
    return mask


def ours(metric: MaskMetric, preds: Tensor, target: Tensor) -> Callable[[], float]:
    def score() -> float:
        metric.reset()
        metric.update(preds, target)
        return metric.compute().item()

    return score


def scipys(preds: Tensor, target: Tensor) -> float:
    distances = []
    for p, t in zip(preds.flatten(0, 1), target.flatten(0, 1), strict=True):
        a, b = np.argwhere(p.numpy()), np.argwhere(t.numpy())
        distances.append(max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]))
    return float(np.mean(distances))


def torchmetrics_hausdorff(preds: Tensor, target: Tensor) -> float:
    metric = torchmetrics.segmentation.HausdorffDistance(num_classes=1, include_background=True)
    return metric(preds.int(), target.int()).item()


def torchmetrics_dice(preds: Tensor, target: Tensor) -> float:
    return torchmetrics.segmentation.DiceScore(num_classes=1)(preds.int(), target.int()).item()


def monai_hausdorff(preds: Tensor, target: Tensor, percentile: float) -> float:
    return compute_hausdorff_distance(preds, target, include_background=True, percentile=percentile).mean().item()


def monai_dice(preds: Tensor, target: Tensor) -> float:
    metric = DiceMetric()
    metric(preds.float(), target.float())
    return metric.aggregate().item()


def rows(name: str, preds: Tensor, target: Tensor, device: str) -> dict[str, Callable[[], float]]:
    on_device = preds.to(device), target.to(device)
    functions: dict[str, Callable[[], float]] = {
        "Hausdorff, lightning_znorm": ours(HausdorffDistance().to(device), *on_device),
        "Hausdorff, SciPy directed_hausdorff": lambda: scipys(preds, target),
        "Hausdorff of surfaces, MONAI": lambda: monai_hausdorff(preds, target, 100),
        "Hausdorff of surfaces, torchmetrics": lambda: torchmetrics_hausdorff(preds, target),
        "HD95, lightning_znorm": ours(HausdorffDistance(95).to(device), *on_device),
        "HD95, MONAI": lambda: monai_hausdorff(preds, target, 95),
        "Dice, lightning_znorm": ours(DiceScore().to(device), *on_device),
        "Dice, MONAI": lambda: monai_dice(preds, target),
        "Dice, torchmetrics": lambda: torchmetrics_dice(preds, target),
        "Tversky, lightning_znorm": ours(TverskyIndex().to(device), *on_device),
    }
    if name == "noise":
        del functions["Hausdorff of surfaces, torchmetrics"]
    return functions


def keep(values: dict[str, float], score: str, function: Callable[[], float]) -> None:
    values[score] = function()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of the scores of masks beside others'.")
    parser.add_argument("--images", type=int, default=16, help="pairs of masks (default: 16)")
    parser.add_argument("--size", type=int, default=256, help="side of a mask in pixels (default: 256)")
    parser.add_argument("--device", default="cpu", help="where our scores compute (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each row (default: 5)")
    args = parser.parse_args()

    warnings.simplefilter("ignore", FutureWarning)  # MONAI's, of its own calls
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (args.images, 1, args.size, args.size)
    masks = {
        "blobs": [blobs(args.images, args.size, generator) for _ in range(2)],
        "noise": [torch.rand(shape, generator=generator) < 0.5 for _ in range(2)],
    }
    print(
        f"torch {torch.__version__}, ours on {args.device}, {args.threads} threads, {args.images} pairs of masks of "
        f"{args.size}x{args.size}, median of {args.rounds} calls\n"
    )
    print(f"| masks | {'score':35} | {'ms':>9} | {'value':>8} |")
    print(f"| ----- | {'-' * 35} | {'-' * 8}: | {'-' * 7}: |")
    for name, (preds, target) in masks.items():
        values: dict[str, float] = {}
        functions = {
            score: partial(keep, values, score, function)
            for score, function in rows(name, preds, target, args.device).items()
        }
        for score, seconds in alternating_medians(functions, args.rounds, warmup=1).items():
            print(f"| {name} | {score:35} | {seconds * 1e3:9.1f} | {values[score]:8.4f} |")


if __name__ == "__main__":
    main()
