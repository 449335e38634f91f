"""Scores do not depend on dtypes: of preds, of target, of the module that holds the metric, or torch's default."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from torch import Tensor

from lightning_znorm.metrics import DiceScore, HausdorffDistance, TverskyIndex, distances
from lightning_znorm.metrics.mask_metric import MaskMetric
from tests.dtypes import DEFAULTS, default_dtype, default_is_never_read, pairwise
from tests.metrics.masks import noise

Make = Callable[[], MaskMetric]

PREDS = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
TARGETS = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
TARGETS += [torch.int8, torch.int16, torch.int32, torch.int64]
# What a Trainer's precision makes of the module that holds the metric.
MODULES = [None, torch.float16, torch.bfloat16, torch.float64]


def dice(preds: np.ndarray, target: np.ndarray) -> float:
    return 2 * (preds & target).sum() / (preds.sum() + target.sum())


def tversky(preds: np.ndarray, target: np.ndarray) -> float:
    hits = (preds & target).sum()
    return hits / (hits + 0.3 * (preds & ~target).sum() + 0.7 * (~preds & target).sum())


def hausdorff(preds: np.ndarray, target: np.ndarray, percentile: float | None = None) -> float:
    if percentile is not None:
        preds, target = preds & ~binary_erosion(preds), target & ~binary_erosion(target)
    apart = cdist(np.argwhere(preds) * (0.7, 1.9), np.argwhere(target) * (0.7, 1.9))
    there, back = apart.min(axis=1), apart.min(axis=0)
    return max(np.percentile(there, percentile or 100), np.percentile(back, percentile or 100))


# By name: a metric, and the score of a pair of masks that are not empty in float64.
SCORES: dict[str, tuple[Make, Callable[..., float]]] = {
    "dice": (DiceScore, dice),
    "tversky": (TverskyIndex, tversky),
    "hausdorff": (lambda: HausdorffDistance(spacing=(0.7, 1.9)), hausdorff),
    "hd95": (lambda: HausdorffDistance(95, spacing=(0.7, 1.9)), lambda p, t: hausdorff(p, t, 95)),
}
EVERY = pytest.mark.parametrize("name", SCORES)
PATHS = pytest.mark.parametrize("path", ["cpu", "gpu"])


@pytest.fixture
def on_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute distances as on a GPU, if ``path`` says so."""
    if path == "gpu":
        monkeypatch.setattr("lightning_znorm.metrics.hausdorff.hausdorff_distances", as_on_gpu)


def as_on_gpu(*arguments: Any) -> Tensor:
    return distances.hausdorff_distances_on_device(*arguments)


@EVERY
@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("path", "default", "preds_dtype", "target_dtype", "module"),
    pairwise(["cpu", "gpu"], DEFAULTS, PREDS, TARGETS, MODULES),
    ids=str,
)
def test_any_types_give_what_float64_gives(
    name: str, default: torch.dtype, preds_dtype: torch.dtype, target_dtype: torch.dtype, module: torch.dtype | None
) -> None:
    make, score = SCORES[name]
    preds, target = noise(3, 2, 12, 15, share=0.2), noise(3, 2, 12, 15, share=0.3, seed=1)
    pairs = zip(preds.flatten(0, 1).numpy(), target.flatten(0, 1).numpy(), strict=True)
    expected = float(np.mean([score(*pair) for pair in pairs]))
    with default_dtype(default):
        holder = torch.nn.ModuleDict({"metric": make()}).to(module)
        metric = holder["metric"]
        for part in (slice(0, 2), slice(2, 3)):
            metric.update(preds[part].to(preds_dtype), target[part].to(target_dtype))
        value = metric.compute()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-6)


@EVERY
@PATHS
@pytest.mark.usefixtures("on_path")
def test_torchs_default_type_is_never_read(name: str) -> None:
    make, _ = SCORES[name]
    preds, target = torch.rand(2, 1, 9, 8), noise(2, 1, 9, 8).to(torch.uint16)
    nothing = torch.zeros(2, 1, 0, 8)
    with default_is_never_read():
        metric = make()
        metric.update(preds, target)
        metric.update(nothing, nothing.int())
        metric.compute()
        metric.reset()
        metric(preds, target)


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize(("make", "expected"), [(DiceScore, 0.8), (TverskyIndex, 2 / (2 + 0.7))])
def test_more_pixels_than_half_precision_counts(make: Make, expected: float, default: torch.dtype) -> None:
    target = torch.ones(1, 1, 300, 300, dtype=torch.bool)
    preds = target.clone()
    preds[..., :100, :] = False
    with default_dtype(default):
        assert make()(preds, target).item() == pytest.approx(expected, rel=1e-7)


def test_a_mean_of_many_masks_keeps_its_digits() -> None:
    metric = DiceScore()
    preds, target = noise(1, 1, 4, 4, share=0.4), noise(1, 1, 4, 4, share=0.6, seed=1)
    score = dice(preds.numpy(), target.numpy())
    metric.update(preds, target)
    # As after 30 million masks of this score, of which a sum in float32 would have lost the last.
    metric.total = metric.total * 3e7
    setattr(metric, metric._counts, metric._numbers * 30_000_000)
    for _ in range(1000):
        metric.update(preds, target)
    assert metric.total.item() == pytest.approx(score * (30_000_000 + 1000), rel=1e-12)
    assert metric.compute().item() == pytest.approx(score, rel=1e-7)


@EVERY
@pytest.mark.parametrize("convert", ["to", "half", "set_dtype"])
def test_states_keep_their_types(name: str, convert: str) -> None:
    make, _ = SCORES[name]
    metric = make()
    preds, target = noise(2, 1, 12, 15, share=0.2), noise(2, 1, 12, 15, share=0.3, seed=1)
    metric.update(preds, target)
    before = metric.compute()
    getattr(metric, convert)(*([] if convert == "half" else [torch.float16]))
    assert torch.equal(metric.compute(), before)
    metric.reset()
    metric.update(preds, target)
    assert torch.equal(metric.compute(), before)
    assert {state.dtype for state in metric.metric_state.values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
@pytest.mark.parametrize("value", [2, 255, 2**16 - 1])
def test_large_unsigned_targets_are_refused(dtype: torch.dtype, value: int) -> None:
    target = torch.tensor([[[[0, value]]]], dtype=torch.int64).to(dtype)
    with pytest.raises(ValueError, match="some values were neither: for masks of 0 and 255"):
        DiceScore().update(torch.zeros(1, 1, 1, 2), target)


def test_the_largest_unsigned_target_is_refused() -> None:
    target = torch.full((1, 1, 1, 2), -1, dtype=torch.int64).to(torch.uint64)
    with pytest.raises(ValueError, match="some values were neither"):
        DiceScore().update(torch.zeros(1, 1, 1, 2), target)
