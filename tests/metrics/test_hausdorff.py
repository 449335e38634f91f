"""The Hausdorff distance against SciPy, MONAI and its definition, with the CPU's code and the GPU's."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance
from scipy.ndimage import binary_erosion, distance_transform_edt
from scipy.spatial.distance import directed_hausdorff
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import MetricCollection

from lightning_znorm.metrics import DiceScore, HausdorffDistance, distances
from lightning_znorm.metrics.distances import hausdorff_distances, hausdorff_distances_on_device
from tests.metrics.masks import PAIRS, batch, box, noise, pairs

# Of MONAI 1.6's own call.
pytestmark = pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")

Path = Callable[..., Tensor]

ALL_PAIRS = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
BOTH_PATHS = pytest.mark.parametrize("path", [hausdorff_distances, hausdorff_distances_on_device], ids=["cpu", "gpu"])
SPACINGS = (0.5, 3.0, 1.25)


def scipys(preds: Tensor, target: Tensor, spacing: Sequence[float]) -> float:
    a, b = (mask.nonzero().double().numpy() * np.array(spacing) for mask in (preds, target))
    return max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])


def by_definition(preds: Tensor, target: Tensor, spacing: Sequence[float]) -> float:
    a, b = (mask.nonzero() * torch.tensor(spacing, dtype=torch.float64) for mask in (preds, target))
    table = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return max(table.amin(0).max(), table.amin(1).max()).item()


def monais(preds: Tensor, target: Tensor, percentile: float, spacing: Sequence[float]) -> float:
    theirs = compute_hausdorff_distance(batch(preds), batch(target), True, percentile=percentile, spacing=list(spacing))
    return theirs.item()


def ours(path: Path, preds: Tensor, target: Tensor, spacing: Sequence[float], percentile: float | None = None):
    (distance,) = path(preds[None], target[None], spacing, percentile)
    assert distance.dtype == torch.float32
    return distance.item()


@ALL_PAIRS
@BOTH_PATHS
class TestNumbers:
    def test_is_scipys(self, pair: tuple[Tensor, Tensor], path: Path) -> None:
        spacing = (1.0, 1.0, 1.0)[: pair[0].ndim]
        # Squares of whole numbers: nothing is rounded before the root.
        assert ours(path, *pair, spacing) == pytest.approx(scipys(*pair, spacing), rel=1.2e-7)

    def test_is_scipys_with_spacing(self, pair: tuple[Tensor, Tensor], path: Path) -> None:
        spacing = SPACINGS[: pair[0].ndim]
        assert ours(path, *pair, spacing) == pytest.approx(scipys(*pair, spacing), rel=1e-6)

    @pytest.mark.parametrize("percentile", [95, 50, 12.5, 100])
    def test_percentile_is_monais(self, pair: tuple[Tensor, Tensor], path: Path, percentile: float) -> None:
        spacing = (1.0, 1.0, 1.0)[: pair[0].ndim]
        assert ours(path, *pair, spacing, percentile) == pytest.approx(monais(*pair, percentile, spacing), abs=1e-5)

    def test_percentile_with_spacing_is_monais(self, pair: tuple[Tensor, Tensor], path: Path) -> None:
        spacing = SPACINGS[: pair[0].ndim]
        assert ours(path, *pair, spacing, 95) == pytest.approx(monais(*pair, 95, spacing), abs=1e-5)


@settings(deadline=None)
@given(pair=pairs(), spacing=st.tuples(*[st.floats(0.01, 100)] * 3))
def test_both_paths_by_definition(pair: tuple[Tensor, Tensor], spacing: tuple[float, ...]) -> None:
    preds, target = pair
    spacing = spacing[: preds.ndim]
    expected = by_definition(preds, target, spacing) if preds.any() and target.any() else None
    for path in (hausdorff_distances, hausdorff_distances_on_device):
        distance = ours(path, preds, target, spacing)
        assert expected is None or distance == pytest.approx(expected, rel=1e-5)


@settings(deadline=None)
@given(pair=pairs(), spacing=st.tuples(*[st.floats(0.01, 100)] * 3), percentile=st.floats(0.1, 100))
def test_both_paths_agree_on_percentiles(
    pair: tuple[Tensor, Tensor], spacing: tuple[float, ...], percentile: float
) -> None:
    preds, target = pair
    spacing = spacing[: preds.ndim]
    one, other = (
        ours(path, preds, target, spacing, percentile) for path in (hausdorff_distances, hausdorff_distances_on_device)
    )
    if preds.any() and target.any():
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5 * max(spacing))


@settings(deadline=None)
@given(pair=pairs(), spacing=st.floats(0.01, 100))
def test_never_more_than_the_diagonal(pair: tuple[Tensor, Tensor], spacing: float) -> None:
    masks = [batch(mask if mask.ndim == 3 else mask[None]) for mask in pair]
    metric = HausdorffDistance(spacing=spacing)
    metric.update(*masks)
    diagonal = spacing * math.hypot(*(n - 1 for n in pair[0].shape))
    assert 0 <= metric.total.item() <= diagonal * (1 + 1e-6)
    if pair[0].any() != pair[1].any():
        assert metric.compute().item() == pytest.approx(diagonal, rel=1e-6)


def test_a_hole_counts() -> None:
    full = box((60, 60), (10, 50), (10, 50))
    ring = full & ~box((60, 60), (11, 49), (11, 49))
    assert HausdorffDistance()(batch(full), batch(ring)).item() == 19
    assert HausdorffDistance(percentile=100)(batch(full), batch(ring)).item() == monais(full, ring, 100, (1, 1)) == 0


def medpys(preds: Tensor, target: Tensor, percentile: float = 95) -> float:
    """The definition of medpy.metric.binary.hd95 (0.5.2), which gives the same number on the case below."""
    a, b = (mask.numpy() & ~binary_erosion(mask.numpy()) for mask in (preds, target))
    together = np.hstack([distance_transform_edt(~b)[a], distance_transform_edt(~a)[b]])
    return float(np.percentile(together, percentile))


def test_medpys_percentile_is_of_both_directions_together() -> None:
    """The figures of the docstring."""
    target = box((64, 64), (10, 30), (10, 30))
    preds = target | box((64, 64), (50, 53), (50, 53))
    ours = HausdorffDistance(95)(batch(preds), batch(target)).item()
    assert ours == pytest.approx(monais(preds, target, 95, (1, 1)))
    figures = {"31.04": ours, "1.48": medpys(preds, target)}
    assert all(f"{number:.2f}" == figure for figure, number in figures.items())
    assert all(figure in str(HausdorffDistance.__doc__) for figure in figures)
    assert medpys(preds, target, 100) == pytest.approx(HausdorffDistance(100)(batch(preds), batch(target)).item())


@BOTH_PATHS
def test_neighbours_far_from_the_origin(path: Path) -> None:
    preds, target = box((1, 6000), (0, 1), (5000, 5001)), box((1, 6000), (0, 1), (5001, 5002))
    assert ours(path, preds, target, (1.0, 0.7)) == pytest.approx(0.7, rel=1e-6)


def test_mean_over_images_and_channels() -> None:
    preds, target = noise(3, 2, 20, 24, share=0.01), noise(3, 2, 20, 24, share=0.01, seed=1)
    expected = np.mean([scipys(p, t, (2, 1)) for p, t in zip(preds.flatten(0, 1), target.flatten(0, 1), strict=True)])
    assert HausdorffDistance(spacing=(2, 1))(preds, target).item() == pytest.approx(expected, rel=1e-6)


def test_one_spacing_is_that_of_all_axes() -> None:
    preds, target = map(batch, PAIRS["volumes"])
    scaled = HausdorffDistance(spacing=2.5)(preds, target)
    torch.testing.assert_close(scaled, 2.5 * HausdorffDistance()(preds, target))
    torch.testing.assert_close(scaled, HausdorffDistance(spacing=[2.5, 2.5, 2.5])(preds, target))


@pytest.mark.parametrize("percentile", [None, 95])
def test_on_device_in_pieces(percentile: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    preds, target = noise(5, 24, 31, share=0.02), noise(5, 24, 31, share=0.02, seed=1)
    whole = hausdorff_distances_on_device(preds, target, (1.0, 0.7), percentile)
    monkeypatch.setattr(distances, "_CHUNK", 7 * 31**2)
    assert torch.equal(hausdorff_distances_on_device(preds, target, (1.0, 0.7), percentile), whole)


class Largest(TorchDispatchMode):
    """Return the number of elements of the largest tensor that is allocated."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("percentile", [None, 95])
def test_memory_on_device_is_that_of_the_masks(percentile: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_CHUNK", 2**16)
    preds, target = noise(8, 128, 128), noise(8, 128, 128, seed=1)
    with Largest() as largest:
        hausdorff_distances_on_device(preds, target, (1.0, 1.0), percentile)
    # Of pairs of pixels there are 2048 times as many.
    assert preds.numel() <= largest.elements <= 2 * preds.numel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentile": 0}, r"percentile must be in \(0, 100\], or None for all pixels, got 0"),
        ({"percentile": 100.5}, r"got 100\.5"),
        ({"percentile": math.nan}, "got nan"),
        ({"spacing": 0}, "spacing must be positive, got 0"),
        ({"spacing": (1.0, -1.0)}, r"spacing must be positive, got \(1\.0, -1\.0\)"),
        ({"spacing": (1.0, math.inf)}, "spacing must be positive"),
        ({"spacing": (1.0, math.nan)}, "spacing must be positive"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HausdorffDistance(**arguments)


@pytest.mark.parametrize(
    ("spacing", "size", "message"),
    [
        ((1, 1), (4, 4, 4), "spacing has 2 numbers, and these masks have 3 axes: .* in the order D, H, W"),
        ((1, 1, 1), (4, 4), "spacing has 3 numbers, and these masks have 2 axes: .* in the order H, W"),
        ((1,), (4, 4), "spacing has 1 numbers"),
    ],
)
def test_spacing_of_other_masks(spacing: tuple, size: tuple, message: str) -> None:
    masks = noise(1, 1, *size)
    with pytest.raises(ValueError, match=message):
        HausdorffDistance(spacing=spacing).update(masks, masks)


class TestSpacingOfEachImage:
    preds, target = noise(5, 2, 6, 14, 11, share=0.05), noise(5, 2, 6, 14, 11, share=0.05, seed=1)
    spacing = ((3.0, 0.5, 0.7), (1.0, 1.0, 1.0), (3.0, 0.5, 0.7), (0.9, 2.0, 1.5), (1.0, 1.0, 1.0))

    @pytest.mark.parametrize("percentile", [None, 95])
    @pytest.mark.parametrize("path", ["cpu", "gpu"])
    def test_each_image_has_its_own(self, percentile: float | None, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def counted(preds: Tensor, *arguments) -> Tensor:
            calls.append(len(preds))
            return (hausdorff_distances if path == "cpu" else hausdorff_distances_on_device)(preds, *arguments)

        preds, target = self.preds.clone(), self.target.clone()
        preds[3, 0] = target[4, 1] = preds[2, 1] = target[2, 1] = False
        expected = torch.stack(
            [
                HausdorffDistance(percentile, steps).score_each(p, t)[0]
                for p, t, steps in zip(preds.split(1), target.split(1), self.spacing, strict=True)
            ]
        )
        monkeypatch.setattr("lightning_znorm.metrics.hausdorff.hausdorff_distances", counted)
        metric = HausdorffDistance(percentile, "image")
        scores = metric.score_each(preds, target, self.spacing)
        torch.testing.assert_close(scores, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert scores[3, 0].item() == pytest.approx(math.hypot(5 * 0.9, 13 * 2.0, 10 * 1.5))
        assert scores[2, 1].isnan()
        assert calls == [4, 4, 2]  # images of one spacing are scored together
        metric.update(preds, target, spacing=self.spacing)
        assert metric.compute().item() == pytest.approx(expected.nanmean().item(), rel=1e-6)
        metric.reset()
        metric.update(preds, target, spacing=self.spacing, scores=scores)
        assert metric.compute().item() == pytest.approx(expected.nanmean().item(), rel=1e-6)

    def test_hd95_is_monais(self) -> None:
        spacing = [list(steps) for steps in self.spacing]
        theirs = compute_hausdorff_distance(self.preds, self.target, True, percentile=95, spacing=spacing)
        ours = HausdorffDistance(95, "image").score_each(self.preds, self.target, self.spacing)
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)

    def test_arrays(self) -> None:
        metric = HausdorffDistance(spacing="image")
        expected = metric.score_each(self.preds, self.target, self.spacing)
        for spacing in (np.array(self.spacing), torch.tensor(self.spacing, dtype=torch.float64)):
            assert torch.equal(metric.score_each(self.preds, self.target, spacing), expected)

    def test_no_images(self) -> None:
        metric = HausdorffDistance(spacing="image")
        metric.update(self.preds[:0], self.target[:0], spacing=[])
        metric.update(self.preds[:, :0], self.target[:, :0], spacing=self.spacing)
        assert int(metric.counted) == 0

    @pytest.mark.parametrize(
        ("spacing", "message"),
        [
            (None, "needs the spacing of each image, and got none: pass spacing="),
            (spacing[:4], "and got 4 for 5 images: pass spacing="),
            ((*spacing[:2], None, *spacing[3:]), "and got none for image 2 of the batch: pass spacing=.* 'affine'"),
            (((1.0, 1.0),) * 5, "spacing has 2 numbers, and these masks have 3 axes: .* in the order D, H, W"),
            ((*spacing[:4], (1.0, 0.0, 1.0)), r"spacing must be positive, got \(1\.0, 0\.0, 1\.0\)"),
        ],
    )
    def test_is_missing_or_bad(self, spacing: Sequence, message: str) -> None:
        metric = HausdorffDistance(spacing="image")
        for call in (metric.score_each, metric.update):
            with pytest.raises(ValueError, match=message):
                call(self.preds, self.target, spacing)
        assert metric.counted == 0

    def test_another_word(self) -> None:
        with pytest.raises(ValueError, match="spacing must be numbers or 'image', got 'images'"):
            HausdorffDistance(spacing="images")

    def test_scores_alone_do_not_know_it(self) -> None:
        masks = noise(2, 4, 4)
        with pytest.raises(ValueError, match="needs the spacing of each image: call score_each or update with spacing"):
            HausdorffDistance(spacing="image").scores(masks, masks)

    def test_other_metrics_ignore_it(self) -> None:
        fixed = HausdorffDistance(spacing=(3.0, 0.5, 0.7))
        expected = fixed.score_each(self.preds, self.target)
        assert torch.equal(fixed.score_each(self.preds, self.target, [None] * 5), expected)

    def test_collection_passes_it_on(self) -> None:
        makes = {"own": lambda: HausdorffDistance(spacing="image"), "one": HausdorffDistance, "dice": DiceScore}
        collection = MetricCollection({name: make() for name, make in makes.items()})
        for part in (slice(0, 2), slice(2, 5)):
            collection.update(self.target[part], self.target[part], spacing=self.spacing[part])  # perfect
            collection.update(self.preds[part], self.target[part], spacing=self.spacing[part])
        values = collection.compute()
        assert len(collection.compute_groups) == 3
        for name, make in makes.items():
            scores = make().score_each(self.preds, self.target, self.spacing)
            best = make().best()
            assert values[name].item() == pytest.approx((scores.mean().item() + best) / 2, rel=1e-6)

    def test_on_a_device(self) -> None:
        metric = HausdorffDistance(95, "image").to("meta")
        masks = torch.ones(5, 2, 6, 14, 11, dtype=torch.bool, device="meta")
        metric.update(masks, masks, self.spacing)


@pytest.mark.gpu
def test_spacing_of_each_image_on_cuda() -> None:
    case = TestSpacingOfEachImage
    metric = HausdorffDistance(95, "image").cuda()
    on_device = case.preds.cuda(), case.target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = metric.score_each(*on_device, case.spacing)
        metric.update(*on_device, case.spacing, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = HausdorffDistance(95, "image").score_each(case.preds, case.target, case.spacing)
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("percentile", [None, 95])
@pytest.mark.parametrize("size", [(256, 256), (20, 64, 48)])
@pytest.mark.parametrize("share", [0.0001, 0.5])
def test_on_cuda(size: tuple[int, ...], share: float, percentile: float | None) -> None:
    preds, target = noise(4, 2, *size, share=share), noise(4, 2, *size, share=share, seed=1)
    spacing = SPACINGS[: len(size)]
    metric = HausdorffDistance(percentile, spacing).cuda()
    on_device = preds.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = HausdorffDistance(percentile, spacing)(preds, target)
    torch.testing.assert_close(metric.compute().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_on_cuda_bad_values_are_found_when_computing() -> None:
    metric, mask = HausdorffDistance().cuda(), noise(1, 1, 8, 8).cuda()
    metric.update(3 * mask.float(), mask)
    with pytest.raises(ValueError, match="turn logits"):
        metric.compute()
