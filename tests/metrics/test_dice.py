"""Dice and Tversky: their numbers, against scikit-learn, MONAI and torchmetrics."""

import math

import pytest
import torch
import torchmetrics.segmentation
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import TverskyLoss
from monai.metrics import DiceMetric
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
from torch import Tensor

from lightning_znorm.metrics import DiceScore, TverskyIndex
from lightning_znorm.metrics.mask_metric import Empty
from tests.metrics.masks import PAIRS, batch, noise, pairs

HAS_DICE = pytest.mark.skipif(
    not hasattr(torchmetrics.segmentation, "DiceScore"), reason="needs a newer torchmetrics: this has no DiceScore"
)
ALL_PAIRS = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@ALL_PAIRS
def test_dice_is_f1(pair: tuple[Tensor, Tensor]) -> None:
    preds, target = pair
    expected = f1_score(target.flatten(), preds.flatten())
    assert DiceScore()(batch(preds), batch(target)).item() == pytest.approx(expected, rel=1e-6)


@ALL_PAIRS
@pytest.mark.parametrize(
    ("alpha", "beta", "score"),
    [(0.5, 0.5, f1_score), (1, 1, jaccard_score), (0, 1, recall_score), (1, 0, precision_score)],
)
def test_what_tversky_generalizes(pair: tuple[Tensor, Tensor], alpha: float, beta: float, score) -> None:
    preds, target = pair
    expected = score(target.flatten(), preds.flatten())
    assert TverskyIndex(alpha, beta)(batch(preds), batch(target)).item() == pytest.approx(expected, rel=1e-6)


@ALL_PAIRS
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (0.9, 0.1), (2.0, 5.0)])
def test_tversky_is_monais(pair: tuple[Tensor, Tensor], alpha: float, beta: float) -> None:
    preds, target = map(batch, pair)
    loss = TverskyLoss(alpha=alpha, beta=beta, smooth_nr=0, smooth_dr=0)(preds.float(), target.float())
    assert TverskyIndex(alpha, beta)(preds, target).item() == pytest.approx(1 - loss.item(), abs=1e-6)


def test_tversky_by_hand() -> None:
    preds = torch.tensor([[[[1, 1, 1, 0, 0, 0]]]]).bool()
    target = torch.tensor([[[[0, 0, 1, 1, 1, 1]]]])
    # 1 hit, 2 false, 3 missed
    assert TverskyIndex()(preds, target).item() == pytest.approx(1 / (1 + 0.3 * 2 + 0.7 * 3))


@settings(deadline=None)
@given(pair=pairs(), alpha=st.floats(0, 10), beta=st.floats(0.01, 10))
def test_tversky_by_definition(pair: tuple[Tensor, Tensor], alpha: float, beta: float) -> None:
    preds, target = (set(map(tuple, mask.nonzero().tolist())) for mask in pair)
    if not preds | target:
        return
    hits = len(preds & target)
    expected = hits / (hits + alpha * len(preds - target) + beta * len(target - preds)) if hits else 0.0
    masks = [mask if mask.ndim == 3 else mask[None] for mask in pair]
    assert TverskyIndex(alpha, beta)(*map(batch, masks)).item() == pytest.approx(expected, rel=1e-5)


class TestMeanOverMasks:
    preds, target = noise(6, 3, 16, 12, seed=1), noise(6, 3, 16, 12, seed=2, share=0.2)

    def test_dice_is_monais(self) -> None:
        metric = DiceMetric(reduction="mean")
        metric(self.preds.float(), self.target.float())
        assert DiceScore()(self.preds, self.target).item() == pytest.approx(metric.aggregate().item(), rel=1e-6)

    def test_monai_leaves_out_every_empty_truth(self) -> None:
        """The figures of the docstring. The masks are those of TEST_CASE_7 in MONAI's test_compute_meandice.py."""
        first = [[[1, 1], [1, 0]], [[0, 1], [0, 0]], [[0, 1], [1, 1]]]
        second = [[[1, 0], [1, 1]], [[0, 1], [1, 1]], [[0, 1], [1, 0]]]
        preds, target = torch.tensor([first, second]).bool(), torch.zeros(2, 3, 2, 2, dtype=torch.bool)
        target[:, 0] = True

        def monais(**kwargs: bool) -> float:
            metric = DiceMetric(**kwargs)
            metric(preds.float(), target.float())
            return metric.aggregate().item()

        ours = DiceScore()(preds, target).item()
        figures = {"0.857": monais(), "0.286": ours}
        assert all(f"{number:.3f}" == figure for figure, number in figures.items())
        assert all(figure in str(DiceScore.__doc__) for figure in figures)
        assert monais(ignore_empty=False) == pytest.approx(ours)
        preds[0, 1] = False
        assert monais(ignore_empty=False) == pytest.approx((5 * DiceScore()(preds, target).item() + 1) / 6)

    @pytest.mark.parametrize(("empty", "ignore_empty"), [("best", False), ("skip_true", True)])
    @pytest.mark.parametrize("seed", range(4))
    def test_policies_are_monais(self, empty: Empty, ignore_empty: bool, seed: int) -> None:
        preds, target = noise(6, 3, 8, 7, share=0.3, seed=seed), noise(6, 3, 8, 7, share=0.3, seed=seed + 9)
        preds[:, 0] &= noise(6, 1, 1, seed=seed + 20)  # empty in half of the images
        target[:, 0] &= noise(6, 1, 1, seed=seed + 30)
        preds[0, 0] = target[0, 0] = preds[1, 0] = target[2, 0] = False
        preds[2, 0, 0, 0] = target[1, 0, 0, 0] = True
        metric = DiceMetric(ignore_empty=ignore_empty, reduction="none")
        metric(preds.float(), target.float())
        theirs = metric.aggregate().double()
        ours = DiceScore(empty=empty)
        torch.testing.assert_close(ours.score_each(preds, target), theirs, equal_nan=True, rtol=1e-6, atol=0)
        assert ours(preds, target).item() == pytest.approx(theirs.nanmean().item(), rel=1e-6)
        assert int(ours.skipped) == int(theirs.isnan().sum())

    @HAS_DICE
    def test_dice_is_torchmetrics_of_one_channel(self) -> None:
        preds, target = self.preds[:, :1], self.target[:, :1]
        theirs = torchmetrics.segmentation.DiceScore(num_classes=1, average="macro")
        assert DiceScore()(preds, target).item() == pytest.approx(theirs(preds.int(), target.int()).item(), rel=1e-6)

    def three_masks(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Two images of two channels: one mask is empty, and each of the others has a score."""
        preds, target = self.preds[:2, :2].clone(), self.target[:2, :2].clone()
        preds[0, 1] = target[0, 1] = False
        cells = [(slice(i, i + 1), slice(c, c + 1)) for i, c in ((0, 0), (1, 0), (1, 1))]
        return preds, target, [DiceScore()(preds[cell], target[cell]) for cell in cells]

    def test_each_mask_has_the_same_weight(self) -> None:
        preds, target, (one, two, three) = self.three_masks()
        torch.testing.assert_close(DiceScore()(preds, target), (one + two + three) / 3)

    @HAS_DICE
    def test_torchmetrics_gives_each_image_the_same_weight(self) -> None:
        preds, target, (one, two, three) = self.three_masks()
        theirs = torchmetrics.segmentation.DiceScore(num_classes=2, average="macro")(preds.int(), target.int())
        torch.testing.assert_close(theirs, (one + (two + three) / 2) / 2)

    def test_tversky_is_monais(self) -> None:
        loss = TverskyLoss(alpha=0.3, beta=0.7, smooth_nr=0, smooth_dr=0)(self.preds.float(), self.target.float())
        assert TverskyIndex()(self.preds, self.target).item() == pytest.approx(1 - loss.item(), abs=1e-6)


@pytest.mark.parametrize(
    "weights", [(-0.1, 1.0), (1.0, -0.1), (0.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)]
)
def test_bad_weights(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"alpha and beta are weights, at least one of them above 0, got"):
        TverskyIndex(*weights)
