"""What all scores of masks share: empty masks, input, states, processes; and how to add a score."""

import copy
import importlib.util
import inspect
import math
import pickle
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_znorm.metrics import DiceScore, HausdorffDistance, MaskCount, TverskyIndex
from lightning_znorm.metrics.mask_metric import MaskMetric
from tests.distributed import run_distributed
from tests.metrics import ddp_masks
from tests.metrics.masks import box, noise

METRICS = {
    "dice": DiceScore,
    "tversky": TverskyIndex,
    "recall": lambda **kwargs: TverskyIndex(0, 1, **kwargs),
    "precision": lambda **kwargs: TverskyIndex(1, 0, **kwargs),
    "hausdorff": HausdorffDistance,
    "hd95": lambda **kwargs: HausdorffDistance(95, **kwargs),
}
EVERY = pytest.mark.parametrize("make", METRICS.values(), ids=METRICS)

SIZE = (9, 13)
NOTHING = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
SOMETHING = noise(1, 1, *SIZE, share=0.2)
WORST = {
    "dice": 0,
    "tversky": 0,
    "recall": 0,
    "precision": 0,
    "hausdorff": math.hypot(8, 12),
    "hd95": math.hypot(8, 12),
}


def states(metric: MaskMetric) -> list[int]:
    return [int(metric.counted), int(metric.skipped)]


class TestEmptyMasks:
    @pytest.mark.parametrize("name", METRICS)
    @pytest.mark.parametrize("pair", [(NOTHING, SOMETHING), (SOMETHING, NOTHING)], ids=["missed", "false"])
    def test_one_is_the_worst_score(self, name: str, pair: tuple[Tensor, Tensor]) -> None:
        metric = METRICS[name]()
        assert metric(*pair).item() == pytest.approx(WORST[name])
        assert states(metric) == [1, 0]

    @pytest.mark.parametrize("percentile", [None, 95])
    def test_diagonal_is_in_units_of_spacing(self, percentile: float | None) -> None:
        metric = HausdorffDistance(percentile, spacing=(0.5, 0.25))
        assert metric(NOTHING, SOMETHING).item() == pytest.approx(5)  # of 9 rows and 13 columns: 4 and 3

    @EVERY
    def test_both_are_left_out(self, make) -> None:
        preds = torch.cat([SOMETHING, NOTHING, noise(1, 1, *SIZE, seed=3), NOTHING])
        target = torch.cat([noise(1, 1, *SIZE, seed=4), NOTHING, SOMETHING, NOTHING])
        metric, of_the_others = make(), make()
        torch.testing.assert_close(metric(preds, target), of_the_others(preds[::2], target[::2]))
        assert states(metric) == [2, 2]
        assert states(of_the_others) == [2, 0]

    @EVERY
    def test_predicting_nothing_never_pays(self, make) -> None:
        nothing, something, better = make(), make(), max if make().higher_is_better else min
        nothing.update(NOTHING, SOMETHING)
        corners = box(SIZE, (0, 1), (0, 1))[None, None]
        something.update(corners, SOMETHING)
        assert better(nothing.compute(), something.compute()) == something.compute()

    @EVERY
    def test_nothing_counted_is_nan_with_one_warning(self, make) -> None:
        metric = make()
        metric.update(NOTHING, NOTHING)
        metric.update(NOTHING, NOTHING)
        name = type(metric).__name__
        with pytest.warns(UserWarning, match=f"{name} is NaN: all 2 masks are empty in prediction and truth") as caught:
            assert metric.compute().isnan()
        assert len(caught) == 1
        for _ in range(2):  # pytest would raise another warning
            metric.reset()
            metric.update(NOTHING, NOTHING)
            assert metric.compute().isnan()
        metric.update(SOMETHING, SOMETHING)
        assert not metric.compute().isnan()

    @EVERY
    def test_a_batch_of_nothing_is_nan_without_a_warning(self, make) -> None:
        metric = make()
        assert metric(NOTHING, NOTHING).isnan()
        value = metric(SOMETHING, SOMETHING)
        assert not value.isnan()
        torch.testing.assert_close(metric.compute(), value)
        assert states(metric) == [1, 1]

    @EVERY
    def test_no_update_is_nan_with_torchmetrics_warning_alone(self, make) -> None:
        with pytest.warns(UserWarning, match="was called before the ``update`` method") as caught:
            assert make().compute().isnan()
        assert len(caught) == 1

    @EVERY
    @pytest.mark.parametrize(
        "shape", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0), (1, 1, 3, 0, 3)], ids=str
    )
    def test_no_images_and_no_pixels(self, make, shape: tuple[int, ...]) -> None:
        metric, mask = make(), torch.zeros(shape, dtype=torch.bool)
        metric.update(mask.float(), mask.int())
        assert states(metric) == [0, shape[0] * shape[1]]
        on_device = make().to("meta")
        on_device.update(mask.float().to("meta"), mask.int().to("meta"))


def four_pairs() -> tuple[Tensor, Tensor]:
    """One image of each kind: both masks, a missed one, a false one, and none; the second channel is never empty."""
    preds, target = noise(4, 2, *SIZE, share=0.2, seed=8), noise(4, 2, *SIZE, share=0.2, seed=9)
    preds[1, 0] = preds[3, 0] = target[2, 0] = target[3, 0] = False
    return preds, target


class TestPolicies:
    @pytest.mark.parametrize("name", METRICS)
    @pytest.mark.parametrize("empty", ["skip", "best", "skip_true"])
    def test_each_score(self, name: str, empty: str) -> None:
        make, (preds, target) = METRICS[name], four_pairs()
        metric = make(empty=empty)
        best = 1.0 if metric.higher_is_better else 0.0
        both = make()(preds[:1, :1], target[:1, :1]).item()
        expected = {
            "skip": [both, WORST[name], WORST[name], math.nan],
            "best": [both, WORST[name], WORST[name], best],
            "skip_true": [both, WORST[name], math.nan, math.nan],
        }[empty]
        scores = metric.score_each(preds, target)
        assert scores.shape == (4, 2)
        assert scores[:, 0].tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert scores[:, 1].tolist() == pytest.approx(
            [make()(p, t).item() for p, t in zip(preds[:, None, 1:], target[:, None, 1:], strict=True)], rel=1e-6
        )
        assert states(metric) == [0, 0]  # no state has changed
        metric.update(preds, target)
        assert metric.compute().item() == pytest.approx(scores.nanmean().item(), rel=1e-6)
        assert states(metric) == [int((~scores.isnan()).sum()), int(scores.isnan().sum())]

    @EVERY
    @pytest.mark.parametrize("empty", ["skip", "best", "skip_true"])
    def test_given_scores_are_not_computed_again(self, make, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
        metric, expected = make(empty=empty), make(empty=empty)
        preds, target = four_pairs()
        expected.update(preds, target)
        scores = metric.score_each(preds, target)
        monkeypatch.setattr(type(metric), "scores", None)
        metric.update(preds, target, scores=scores)
        assert metric.compute() == expected.compute()
        assert states(metric) == states(expected)

    @EVERY
    @pytest.mark.parametrize("shape", [(8,), (2, 4), (4, 1), ()], ids=str)
    def test_scores_of_other_masks(self, make, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"scores must be what score_each returned .* of shape \(4, 2\), got"):
            make().update(*four_pairs(), scores=torch.zeros(shape))

    @EVERY
    def test_score_each_checks_as_update_does(self, make) -> None:
        for preds, target, message in [
            (SOMETHING, SOMETHING[0], "of one shape"),
            (2 * SOMETHING.float(), SOMETHING, "turn logits"),
            (SOMETHING, 255 * SOMETHING.int(), "target > 0"),
        ]:
            with pytest.raises(ValueError, match=message):
                make().score_each(preds, target)

    @pytest.mark.parametrize("name", METRICS)
    def test_nothing_counted_of_no_truth(self, name: str) -> None:
        metric = METRICS[name](empty="skip_true")
        metric.update(SOMETHING, NOTHING)
        with pytest.warns(UserWarning, match="is NaN: all 1 masks are empty in the truth, so there is nothing"):
            assert metric.compute().isnan()

    @EVERY
    @pytest.mark.parametrize("empty", ["", "worst", None, True])
    def test_another_word(self, make, empty: object) -> None:
        with pytest.raises(ValueError, match="empty must be 'skip', 'best' or 'skip_true', got"):
            make(empty=empty)

    @pytest.mark.parametrize("first", [(NOTHING, NOTHING), (SOMETHING, SOMETHING)], ids=["empty", "perfect"])
    def test_collection_keeps_them_apart(self, first: tuple[Tensor, Tensor]) -> None:
        collection = MetricCollection({empty: DiceScore(empty=empty) for empty in ("skip", "best", "skip_true")})
        collection.update(*first)
        collection.update(*four_pairs())
        for empty, value in collection.compute().items():
            metric = DiceScore(empty=empty)
            metric.update(*first)
            metric.update(*four_pairs())
            assert metric.compute() == value
        assert len(collection.compute_groups) == 3

    @EVERY
    @pytest.mark.parametrize("empty", ["skip", "best", "skip_true"])
    def test_on_a_device(self, make, empty: str) -> None:
        metric = make(empty=empty).to("meta")
        preds, target = torch.rand(3, 2, 8, 9, device="meta"), torch.ones(3, 2, 8, 9, device="meta").int()
        scores = metric.score_each(preds, target)
        assert scores.shape == (3, 2)
        metric.update(preds, target, scores=scores)


class TestMaskCount:
    @pytest.mark.parametrize("empty", ["skip", "best", "skip_true"])
    def test_is_what_a_score_counts(self, empty: str) -> None:
        score, counts = DiceScore(empty=empty), [MaskCount(left_out, empty=empty) for left_out in (False, True)]
        for preds, target in (four_pairs(), (NOTHING, NOTHING), (SOMETHING, NOTHING)):
            score.update(preds, target)
            batch = [int(count(preds, target)) for count in counts]
            assert sum(batch) == len(preds) * preds.shape[1]
        assert [count.compute().item() for count in counts] == states(score)
        assert states(score) == {"skip": [8, 2], "best": [10, 0], "skip_true": [6, 4]}[empty]

    def test_threshold(self) -> None:
        preds = torch.tensor([[[[0.6, 0.2]]], [[[0.8, 0.2]]]])
        for threshold, expected in ((0.5, 2), (0.7, 1), (0.9, 0)):
            assert MaskCount(threshold=threshold)(preds, torch.zeros(2, 1, 1, 2, dtype=torch.bool)) == expected

    def test_life(self) -> None:
        count = MaskCount()
        count.update(*four_pairs())
        for twin in (count.clone(), pickle.loads(pickle.dumps(count)), count.to(torch.float16)):
            assert twin.compute() == 7
            assert twin.compute().dtype == torch.float32
        with torch.inference_mode():
            count.reset()
        count.update(NOTHING, NOTHING)
        assert count.compute() == 0

    def test_input(self) -> None:
        with pytest.raises(ValueError, match="MaskCount takes preds that are probabilities, and some were NaN"):
            MaskCount().update(2 * SOMETHING.float(), SOMETHING)
        with pytest.raises(TypeError, match="MaskCount takes a target that is bool or integer"):
            MaskCount().update(SOMETHING, SOMETHING.float())

    def test_on_a_device(self) -> None:
        count = MaskCount().to("meta")
        mask = torch.ones(3, 2, 8, 9, device="meta").bool()
        assert count(mask, mask).device.type == "meta"


class TestMean:
    preds, target = noise(7, 2, 10, 11, share=0.1, seed=1), noise(7, 2, 10, 11, share=0.1, seed=2)

    @EVERY
    def test_over_batches_is_that_over_all(self, make) -> None:
        metric, whole = make(), make()
        for first, last in [(0, 4), (4, 5), (5, 5), (5, 7)]:
            batch = metric(self.preds[first:last], self.target[first:last])
            if first < last:
                torch.testing.assert_close(batch, make()(self.preds[first:last], self.target[first:last]))
        torch.testing.assert_close(metric.compute(), whole(self.preds, self.target))
        assert states(metric) == [14, 0]

    @EVERY
    def test_states_do_not_grow(self, make) -> None:
        metric = make()
        sizes = []
        for _ in range(3):
            metric.update(self.preds, self.target)
            assert all(isinstance(state, Tensor) for state in metric.metric_state.values())
            sizes.append(sum(state.numel() for state in metric.metric_state.values()))
        assert sizes == [sizes[0]] * 3
        assert sizes[0] < 10

    @EVERY
    def test_a_sum_survives_half_precision_modules(self, make) -> None:
        holder = torch.nn.ModuleDict({"metric": make()}).to(torch.bfloat16)  # as Lightning's "bf16-true" does
        metric = holder["metric"]
        for _ in range(300):
            metric.update(self.preds[:1], self.target[:1])
        expected = make()(self.preds[:1], self.target[:1])
        torch.testing.assert_close(metric.compute(), expected, rtol=1e-5, atol=0)
        metric.reset()
        assert metric.total.dtype == torch.float64

    def test_inference_mode(self) -> None:
        metric = DiceScore()
        with torch.inference_mode():
            metric.reset()
            metric.update(self.preds, self.target)
        metric.update(self.preds, self.target)
        assert states(metric) == [28, 0]

    @EVERY
    def test_no_look_at_values_on_a_device(self, make) -> None:
        # The meta device has no values: whatever would wait for a GPU raises there.
        metric = make().to("meta")
        preds, target = torch.rand(3, 2, 8, 9, device="meta"), torch.ones(3, 2, 8, 9, device="meta").int()
        metric.update(preds, target)
        assert metric(preds, target).device.type == "meta"
        with pytest.raises(NotImplementedError, match="no data"):
            metric.compute()


class TestInput:
    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
    def test_probabilities(self, make, dtype: torch.dtype, threshold: float) -> None:
        generator = torch.Generator().manual_seed(0)
        # Next to the threshold too, where half precision would round both to the same.
        preds = torch.rand(2, 1, *SIZE, generator=generator).to(dtype)
        preds[0, 0, 0] = torch.tensor(threshold, dtype=dtype)
        target = noise(2, 1, *SIZE, seed=1)
        expected = make()(
            preds.double() >= torch.tensor(threshold, dtype=torch.promote_types(dtype, torch.float32)), target
        )
        assert make(threshold=threshold)(preds, target) == expected

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
    def test_integer_targets(self, make, dtype: torch.dtype) -> None:
        preds, target = noise(2, 1, *SIZE), noise(2, 1, *SIZE, seed=1)
        assert make()(preds, target.to(dtype)) == make()(preds, target)

    @EVERY
    def test_probabilities_with_a_gradient(self, make) -> None:
        preds = torch.rand(2, 1, *SIZE, requires_grad=True)
        metric = make()
        assert not metric(preds, noise(2, 1, *SIZE)).requires_grad
        assert not metric.compute().requires_grad

    @EVERY
    def test_volumes(self, make) -> None:
        # A volume of one slice is an image.
        preds, target = noise(3, 2, *SIZE, share=0.1), noise(3, 2, *SIZE, share=0.1, seed=1)
        torch.testing.assert_close(make()(preds.unsqueeze(2), target.unsqueeze(2)), make()(preds, target))

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64], ids=str)
    def test_preds_of_another_type(self, make, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=rf"takes preds that are probabilities or bool, got {dtype}: for masks"):
            make().update(SOMETHING.to(dtype), SOMETHING)

    @EVERY
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64], ids=str)
    def test_target_of_another_type(self, make, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=rf"a target that is bool or integer, got {dtype}: pass target.bool\(\)"):
            make().update(SOMETHING, SOMETHING.to(dtype))

    @EVERY
    @pytest.mark.parametrize(
        ("preds", "target"),
        [((2, 1, 4, 4), (2, 4, 4)), ((2, 1, 4, 4), (1, 1, 4, 4)), ((4, 4, 4),) * 2, ((1,) * 6,) * 2],
        ids=str,
    )
    def test_other_shapes(self, make, preds: tuple[int, ...], target: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"of one shape, \(N, C, H, W\) or \(N, C, D, H, W\), got \(\d") as error:
            make().update(noise(*preds), noise(*target))
        assert f"{preds} and {target}" in str(error.value)

    @EVERY
    @pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, -math.inf])
    def test_logits_and_nan(self, make, value: float) -> None:
        preds = SOMETHING.float()
        preds[0, 0, 2, 3] = value
        with pytest.raises(ValueError, match=r"some were NaN or outside \[0, 1\]: turn logits"):
            make().update(preds, SOMETHING)

    @EVERY
    @pytest.mark.parametrize("value", [255, 2, -1])
    def test_target_of_other_values(self, make, value: int) -> None:
        with pytest.raises(ValueError, match="some values were neither: for masks of 0 and 255 pass target > 0"):
            make().update(SOMETHING, SOMETHING.int() * value)

    @EVERY
    def test_a_refused_batch_is_not_added(self, make) -> None:
        metric = make()
        metric.update(SOMETHING, SOMETHING)
        with pytest.raises(ValueError, match="turn logits"):
            metric.update(2 * SOMETHING.float(), SOMETHING)
        metric.compute()
        assert states(metric) == [1, 0]

    @EVERY
    @pytest.mark.parametrize(
        ("preds", "target", "message"),
        [(2 * SOMETHING.float(), SOMETHING, "turn logits"), (SOMETHING, 255 * SOMETHING.int(), "target > 0")],
    )
    def test_values_of_a_device_are_refused_when_computing(
        self, make, preds: Tensor, target: Tensor, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        metric = make()
        with monkeypatch.context() as patch:
            patch.setattr(MaskMetric, "_require_fitting_values", lambda self, misfits: None)  # as on a GPU
            metric.update(preds, target)
            metric.update(SOMETHING, SOMETHING)
        with pytest.raises(ValueError, match=message):
            metric.compute()
        metric.reset()
        metric.update(SOMETHING, SOMETHING)
        metric.compute()

    @EVERY
    @pytest.mark.parametrize("threshold", [0, 1, -0.5, 2, math.nan])
    def test_threshold(self, make, threshold: float) -> None:
        with pytest.raises(ValueError, match=r"threshold is a probability, in \(0, 1\), got"):
            make(threshold=threshold)

    @EVERY
    def test_torchmetrics_arguments(self, make) -> None:
        assert make(sync_on_compute=False).sync_on_compute is False
        with pytest.raises(ValueError, match="Unexpected keyword arguments: `size`"):
            make(size=3)


class TestLife:
    @EVERY
    def test_copies(self, make) -> None:
        metric = make()
        metric.update(NOTHING, NOTHING)
        metric.update(noise(2, 1, *SIZE, seed=5), noise(2, 1, *SIZE, seed=6))
        for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.to("cpu")):
            assert states(twin) == [2, 1]
            torch.testing.assert_close(twin.compute(), metric.compute())
        twin = metric.clone()
        twin.update(SOMETHING, NOTHING)
        assert states(metric) == [2, 1]
        assert states(twin) == [3, 1]
        twin.reset()
        assert states(twin) == [0, 0]
        assert twin(SOMETHING, NOTHING) == make()(SOMETHING, NOTHING)

    @EVERY
    def test_state_dict(self, make) -> None:
        assert make().state_dict() == {}
        metric, restored = make(), make()
        metric.persistent(True)
        restored.persistent(True)
        metric.update(noise(2, 1, *SIZE, seed=5), noise(2, 1, *SIZE, seed=6))
        restored.load_state_dict(metric.state_dict())
        restored.update(NOTHING, NOTHING)
        torch.testing.assert_close(restored.compute(), metric.compute())
        assert states(restored) == [2, 1]

    @pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this torchmetrics merges no states")
    @EVERY
    def test_merge(self, make) -> None:
        metric, other, both = make(), make(), make()
        metric.update(SOMETHING, noise(1, 1, *SIZE, seed=5))
        other.update(NOTHING, SOMETHING)
        metric.merge_state(other)
        both.update(SOMETHING, noise(1, 1, *SIZE, seed=5))
        both.update(NOTHING, SOMETHING)
        torch.testing.assert_close(metric.compute(), both.compute())

    @pytest.mark.parametrize("first", [(NOTHING, NOTHING), (SOMETHING, SOMETHING)], ids=["empty", "perfect"])
    def test_collection_keeps_metrics_apart(self, first: tuple[Tensor, Tensor]) -> None:
        # MetricCollection takes metrics whose states agree after the first batch for one.
        makes = {
            **METRICS,
            "strict": lambda: DiceScore(threshold=0.9),
            "wide": lambda: HausdorffDistance(spacing=2),
            "same": lambda: TverskyIndex(0.3, 0.7),
        }
        collection = MetricCollection({name: make() for name, make in makes.items()}, prefix="val/")
        preds, target = torch.rand(2, 1, *SIZE), noise(2, 1, *SIZE, share=0.1)
        collection.update(*first)
        collection.update(preds, target)
        result = collection.clone().compute()
        for name, make in makes.items():
            metric = make()
            metric.update(*first)
            metric.update(preds, target)
            torch.testing.assert_close(result[f"val/{name}"], metric.compute())
        assert len({value.item() for value in result.values()}) == len(makes) - 1
        assert {"tversky", "same"} in map(set, collection.compute_groups.values())

    @pytest.mark.parametrize("name", METRICS)
    def test_plot(self, name: str) -> None:
        metric = METRICS[name]()
        values = [metric(SOMETHING, noise(1, 1, *SIZE, seed=seed)) for seed in range(3)]
        if importlib.util.find_spec("matplotlib") is None:
            with pytest.raises(ModuleNotFoundError, match="matplotlib"):
                metric.plot()
            return
        import matplotlib

        matplotlib.use("Agg")
        figure, axes = metric.plot()
        assert axes.get_ylabel() == type(metric).__name__ or axes.get_title() == type(metric).__name__
        (line,) = [line for line in metric.plot(values)[1].get_lines() if len(line.get_xdata()) == 3]
        assert list(line.get_ydata()) == pytest.approx([value.item() for value in values])
        assert metric.plot(ax=axes)[0] is None
        assert figure is not None


def test_two_processes() -> None:
    """Five batches in two processes, or none in one of them, give what they give in one process."""
    records = run_distributed(ddp_masks.score)
    for scenario, batches in ddp_masks.SCENARIOS.items():
        ranks = [record[scenario] for record in records]
        for name, make in ddp_masks.METRICS.items():
            whole = make()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for number in range(sum(batches)):
                    whole.update(*ddp_masks.batch_of(scenario, number))
                expected = whole.compute().item()
            for record in ranks:
                assert record[name]["value"] == pytest.approx(expected, rel=1e-6, nan_ok=True)
                assert record[name]["synchronised"] == states(whole)
            # Each process goes on with its own.
            own = [record[name]["own"] for record in ranks]
            assert [sum(numbers) for numbers in zip(*own, strict=True)] == states(whole)
            assert own[1] == [0, 0] or scenario != "one idle"
        warned = [len(record["warnings"]) for record in ranks]
        expected_warnings = [len(ddp_masks.METRICS), 0] if scenario == "nothing" else [0, 0]
        assert warned == expected_warnings, [record["warnings"] for record in ranks]


def test_private_names_of_torchmetrics_that_are_used() -> None:
    """`MaskMetric` overrides how states are converted, which torchmetrics has no public name for."""
    metric = DiceScore()
    missing = [name for name in ("_apply", "_defaults", "_computed", "_plot") if not hasattr(metric, name)]
    assert not missing, f"this torchmetrics has no Metric.{missing}: MaskMetric._apply and .plot need another way"
    assert list(inspect.signature(Metric._apply).parameters) == ["self", "fn", "exclude_state"]


class Jaccard(MaskMetric):
    """A new score: it needs its value for pairs of masks, and the worst value."""

    higher_is_better = True

    def worst(self, size: Sequence[int]) -> float:
        return 0.0

    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        return (preds & target).flatten(1).sum(dim=1).double() / (preds | target).flatten(1).sum(dim=1)


def test_a_new_score() -> None:
    metric, expected = Jaccard(threshold=0.5), TverskyIndex(1, 1)
    for seed in range(3):
        preds, target = noise(3, 2, *SIZE, share=0.2, seed=seed), noise(3, 2, *SIZE, share=0.3, seed=seed + 9)
        target[seed] = False
        preds[seed, 1] = False
        for each in (metric, expected):
            each.update(preds, target)
    assert metric.compute().item() == pytest.approx(expected.compute().item())
    assert states(metric) == states(expected) == [15, 3]


def test_a_new_score_has_all_policies() -> None:
    preds, target = four_pairs()
    for empty in ("skip", "best", "skip_true"):
        scores = Jaccard(threshold=0.5, empty=empty).score_each(preds, target)
        torch.testing.assert_close(scores, TverskyIndex(1, 1, empty=empty).score_each(preds, target), equal_nan=True)


class Shifted(Jaccard):
    """A score on a scale of its own, from 1 to 2."""

    def worst(self, size: Sequence[int]) -> float:
        return 1.0

    def best(self) -> float:
        return 2.0

    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        return 1 + super().scores(preds, target)


class Unsaid(Jaccard):
    """A score that does not say whether higher is better."""

    higher_is_better = None


def test_the_best_score() -> None:
    assert Shifted(threshold=0.5, empty="best")(NOTHING, NOTHING) == 2
    assert Unsaid(threshold=0.5).score_each(NOTHING, NOTHING).isnan().all()
    with pytest.raises(ValueError, match=r"Unsaid does not say what its best score is: set its higher_is_better, or"):
        Unsaid(threshold=0.5, empty="best").update(NOTHING, NOTHING)
