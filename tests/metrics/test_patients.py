"""Scores and counts of patients, against NumPy and MONAI: slices in any order, batches and processes."""

import copy
import math
import pickle
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from monai.metrics import DiceMetric
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_znorm.metrics import DiceScore, MaskCount, PatientCount, PatientDiceScore
from lightning_znorm.metrics.patients import PatientMetric
from tests.distributed import run_distributed
from tests.dtypes import DEFAULTS, default_dtype, default_is_never_read
from tests.metrics import ddp_patients
from tests.metrics.masks import noise

POLICIES = ["skip", "best", "skip_true"]
MAKES = {
    "dice": PatientDiceScore,
    "counted": PatientCount,
    "left out": lambda **kwargs: PatientCount(left_out=True, **kwargs),
}
EVERY = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
POLICY = pytest.mark.parametrize("empty", POLICIES)

NOTHING = torch.zeros(1, 1, 6, 5, dtype=torch.bool)
SOMETHING = noise(1, 1, 6, 5, share=0.3)


def study(seed: int, classes: int = 2) -> tuple[Tensor, Tensor, list[str | None]]:
    """Slices of a few patients in no order, and of unknown ones. Any volume may be empty in any way."""
    generator = random.Random(seed)
    preds, target, names = [], [], []
    for name in ["anna", "ben", "cem", "dora", None, None, None]:
        # Volumes that are empty in prediction, truth, both or neither.
        kept = torch.tensor([[generator.random() < 0.6 for _ in range(classes)] for _ in range(2)])
        for _ in range(1 if name is None else generator.randint(1, 4)):
            some = noise(2, classes, 6, 5, share=0.2, seed=generator.randrange(10**6))
            if generator.random() < 0.3:
                some[generator.randrange(2)] = False
            some = some & kept[..., None, None]
            preds.append(some[0])
            target.append(some[1])
            names.append(name)
    order = generator.sample(range(len(names)), len(names))
    return torch.stack(preds)[order], torch.stack(target)[order], [names[i] for i in order]


def expected_of(
    preds: Tensor, target: Tensor, names: Sequence[str | None] | None, empty: str
) -> dict[str, float | list[float]]:
    """What the metrics must give, in NumPy: one volume after another."""
    keys = [index if name is None else name for index, name in enumerate(names or [None] * len(preds))]
    scores, skipped, patients, left_out = [], 0, 0, 0
    for key in dict.fromkeys(keys):
        slices = [i for i, other in enumerate(keys) if other == key]
        p, t = preds[slices].numpy(), target[slices].numpy()
        before = len(scores)
        for number in range(p.shape[1]):
            a, b = p[:, number], t[:, number]
            if (empty == "skip_true" and not b.any()) or (empty == "skip" and not (a | b).any()):
                skipped += 1
            else:
                scores.append(2 * np.sum(a & b) / (np.sum(a) + np.sum(b)) if (a | b).any() else 1.0)
        patients += len(scores) > before
        left_out += len(scores) == before
    mean = float(np.mean(np.array(scores, dtype=np.float64))) if scores else math.nan
    return {"dice": mean, "states": [len(scores), skipped], "counted": patients, "left out": left_out}


def batches(*lists: Any, seed: int) -> Iterator[tuple[Any, ...]]:
    generator, start = random.Random(seed), 0
    while start < len(lists[0]):
        end = start + generator.randint(1, 4)
        yield tuple(each[start:end] for each in lists)
        start = end


class TestNumbers:
    @POLICY
    @pytest.mark.parametrize("seed", range(12))
    def test_are_numpys(self, empty: str, seed: int) -> None:
        preds, target, names = study(seed)
        expected = expected_of(preds, target, names, empty)
        for name, make in MAKES.items():
            metric = make(empty=empty)
            for p, t, patient in batches(preds, target, names, seed=seed):
                metric.update(p, t, patient)
            assert metric.compute().dtype == torch.float32
            assert metric.compute().item() == pytest.approx(expected[name], rel=1e-6)
            if isinstance(metric, PatientDiceScore):
                assert [int(metric.counted), int(metric.skipped)] == expected["states"]

    @POLICY
    def test_order_and_batches_do_not_matter(self, empty: str) -> None:
        preds, target, names = study(3)
        values = set()
        for seed in range(8):
            order = random.Random(seed).sample(range(len(names)), len(names))
            metric = PatientDiceScore(empty=empty)
            for p, t, patient in batches(preds[order], target[order], [names[i] for i in order], seed=seed):
                metric.update(p, t, patient=patient)
            values.add(f"{metric.compute().item():.6f}")
        assert len(values) == 1

    @POLICY
    @pytest.mark.parametrize("seed", range(6))
    def test_is_the_dice_of_volumes(self, empty: str, seed: int) -> None:
        preds, target = noise(12, 2, 6, 5, share=0.2, seed=seed), noise(12, 2, 6, 5, share=0.2, seed=seed + 50)
        preds[:4, 0] = target[4:8] = preds[8:] = target[8:, 1] = False
        volumes = [masks.view(3, 4, 2, 6, 5).transpose(1, 2) for masks in (preds, target)]
        metric, of_volumes = PatientDiceScore(empty=empty), PatientDiceScore(empty=empty)
        value = metric(preds, target, patient=[i // 4 for i in range(12)])
        dice = DiceScore(empty=empty)
        torch.testing.assert_close(value, dice(*volumes))
        torch.testing.assert_close(value, of_volumes(*volumes))  # no name: each is a patient of its own
        assert (metric.counted, metric.skipped) == (dice.counted, dice.skipped)
        assert int(dice.skipped) == {"skip": 1, "best": 0, "skip_true": 3}[empty]

    @pytest.mark.parametrize(("empty", "ignore_empty"), [("best", False), ("skip_true", True)])
    @pytest.mark.parametrize("seed", range(6))
    def test_is_monais_of_volumes(self, empty: str, ignore_empty: bool, seed: int) -> None:
        preds, target, names = study(seed)
        known = [i for i, name in enumerate(names) if name is not None]
        monais = DiceMetric(ignore_empty=ignore_empty, reduction="none")
        for name in sorted({str(names[i]) for i in known}):
            slices = [i for i in known if names[i] == name]
            monais(*(masks[slices].transpose(0, 1)[None].float() for masks in (preds, target)))
        expected = monais.aggregate().nanmean().item()
        metric = PatientDiceScore(empty=empty)
        metric.update(preds[known], target[known], [names[i] for i in known])
        assert metric.compute().item() == pytest.approx(expected, rel=1e-6)

    def test_of_one_class(self) -> None:
        preds, target, names = study(5)
        each = []
        for number in (0, 1):
            metric = PatientDiceScore(empty="best")
            metric.update(preds[:, number : number + 1], target[:, number : number + 1], names)
            expected = expected_of(preds[:, number, None], target[:, number, None], names, "best")
            each.append(metric.compute().item())
            assert each[-1] == pytest.approx(expected["dice"], rel=1e-6)
        both = PatientDiceScore(empty="best")
        both.update(preds, target, names)
        assert both.compute().item() == pytest.approx(sum(each) / 2)

    def test_a_stray_pixel_decides_a_slice_and_no_patient(self) -> None:
        target = torch.zeros(10, 1, 8, 8, dtype=torch.bool)
        target[0, 0, 1:7, 1:7] = True
        preds = target.clone()
        preds[1:, 0, 0, 0] = True
        patient = PatientDiceScore()
        patient.update(preds, target, ["anna"] * 10)
        assert patient.compute().item() == pytest.approx(72 / 81)
        assert DiceScore()(preds, target).item() == pytest.approx(0.1)


class TestNames:
    preds, target = noise(4, 1, 6, 5, share=0.3), noise(4, 1, 6, 5, share=0.3, seed=1)

    def value(self, patient: Sequence[str | int | None] | None) -> float:
        metric = PatientDiceScore()
        metric.update(self.preds, self.target, patient)
        return metric.compute().item()

    def test_numbers_are_names(self) -> None:
        assert self.value([7, 7, 8, 8]) == self.value(["7", "7", "8", "8"]) == self.value(["a", "a", "b", "b"])

    def test_no_name_is_a_patient_of_its_own(self) -> None:
        each = [self.value(list(names)) for names in ("abcd", [None] * 4)]
        assert [self.value(None), *each] == pytest.approx([DiceScore()(self.preds, self.target).item()] * 3)
        assert self.value(["a", None, None, "a"]) == pytest.approx(self.value(["a", "b", "c", "a"]))
        assert self.value(["a", None, None, "a"]) != pytest.approx(self.value(["a", "b", "b", "a"]))

    def test_keys_are_the_same_in_every_process(self) -> None:
        metric = PatientDiceScore()
        metric.update(self.preds[:2], self.target[:2], ["anna", None])
        ((key, own),) = [rows[:, 0].tolist() for rows in metric.metric_state["rows of patients 0.5"]]
        assert (key, own) == (7503624139547223366, -1)

    @pytest.mark.parametrize("patient", ["anna", torch.arange(4), np.arange(4), [1.5] * 4], ids=str)
    def test_other_types(self, patient: Any) -> None:
        with pytest.raises(TypeError, match=r"patient as a list with a name or a number .* pass patient\.tolist\(\)"):
            self.value(patient)

    @EVERY
    def test_other_lengths(self, make) -> None:
        with pytest.raises(ValueError, match="one patient for each image, got 3 for 4 images"):
            make().update(self.preds, self.target, ["a"] * 3)


class TestNothing:
    def test_is_nan_with_one_warning(self) -> None:
        metric = PatientDiceScore()
        metric.update(NOTHING, NOTHING, ["anna"])
        metric.update(NOTHING.expand(3, -1, -1, -1), NOTHING.expand(3, -1, -1, -1), ["anna", "ben", None])
        message = "PatientDiceScore is NaN: all 3 volumes of patients are empty in prediction and truth"
        with pytest.warns(UserWarning, match=message) as caught:
            assert metric.compute().isnan()
        assert len(caught) == 1
        metric.reset()
        metric.update(NOTHING, NOTHING)
        assert metric.compute().isnan()
        metric.update(SOMETHING, SOMETHING)
        assert metric.compute() == 1

    def test_of_no_truth(self) -> None:
        metric = PatientDiceScore(empty="skip_true")
        metric.update(SOMETHING, NOTHING)
        with pytest.warns(UserWarning, match="all 1 volumes of patients are empty in the truth"):
            assert metric.compute().isnan()

    def test_counts_are_no_reason_to_warn(self) -> None:
        for left_out in (False, True):
            metric = PatientCount(left_out)
            metric.update(NOTHING, NOTHING)
            assert metric.compute() == int(left_out)

    def test_a_batch_of_nothing_is_nan_without_a_warning(self) -> None:
        metric = PatientDiceScore()
        assert metric(NOTHING, NOTHING, ["anna"]).isnan()
        assert metric(SOMETHING, SOMETHING, ["anna"]) == 1
        assert (metric.compute(), metric.counted, metric.skipped) == (1, 1, 0)

    @EVERY
    @pytest.mark.parametrize("shape", [(0, 2, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4), (1, 1, 3, 0, 3)], ids=str)
    def test_no_images_and_no_pixels(self, make, shape: tuple[int, ...]) -> None:
        metric, mask = make(), torch.zeros(shape, dtype=torch.bool)
        metric.update(mask.float(), mask.int(), ["anna"] * shape[0])
        metric.update(SOMETHING, SOMETHING, ["anna"])
        assert metric.compute() == (0 if getattr(metric, "left_out", False) else 1)

    @EVERY
    def test_no_update(self, make) -> None:
        metric = make()
        with pytest.warns(UserWarning, match="was called before the ``update`` method") as caught:
            value = metric.compute()
        assert len(caught) == 1
        assert value.isnan() if make is PatientDiceScore else value == 0


class TestInput:
    @EVERY
    @pytest.mark.parametrize(
        ("preds", "target", "error", "message"),
        [
            (SOMETHING.long(), SOMETHING, TypeError, "preds that are probabilities or bool"),
            (SOMETHING, SOMETHING.float(), TypeError, "a target that is bool or integer"),
            (SOMETHING, SOMETHING[0], ValueError, r"of one shape, \(N, C, H, W\)"),
            (3 * SOMETHING.float(), SOMETHING, ValueError, "turn logits"),
            (SOMETHING * math.nan, SOMETHING, ValueError, "turn logits"),
            (SOMETHING, 255 * SOMETHING.int(), ValueError, "some values were neither: for masks of 0 and 255"),
        ],
    )
    def test_is_refused_and_not_added(self, make, preds: Tensor, target: Tensor, error, message: str) -> None:
        metric = make()
        metric.update(SOMETHING, SOMETHING)
        before = metric.compute()
        with pytest.raises(error, match=f"{type(metric).__name__} takes .*{message}|{message}"):
            metric.update(preds, target)
        assert metric.compute() == before

    @EVERY
    def test_values_of_a_device_are_refused_when_computing(self, make, monkeypatch: pytest.MonkeyPatch) -> None:
        metric = make()
        with monkeypatch.context() as patch:
            patch.setattr(PatientMetric, "_require_fitting_values", lambda self, misfits: None)  # as on a GPU
            metric.update(SOMETHING, 255 * SOMETHING.int())
            metric.update(SOMETHING, SOMETHING)
        with pytest.raises(ValueError, match="target > 0"):
            metric.compute()
        metric.reset()
        metric.update(SOMETHING, SOMETHING)
        metric.compute()

    @EVERY
    def test_no_look_at_values_on_a_device(self, make) -> None:
        # The meta device has no values: whatever would wait for a GPU raises there.
        metric = make().to("meta")
        preds, target = torch.rand(3, 2, 8, 9, device="meta"), torch.ones(3, 2, 8, 9, device="meta").int()
        metric.update(preds, target, ["anna", "anna", None])
        assert metric(preds, target, ["anna", "ben", None]).device.type == "meta"
        with pytest.raises(NotImplementedError, match="no data"):
            metric.compute()

    @EVERY
    @pytest.mark.parametrize("arguments", [{"threshold": 1.0}, {"empty": "worst"}, {"empty": None}])
    def test_arguments(self, make, arguments: dict) -> None:
        (name,) = arguments
        with pytest.raises(ValueError, match=f"{name} (is a probability|must be 'skip', 'best' or 'skip_true', got)"):
            make(**arguments)


class TestDtypes:
    @pytest.mark.parametrize("default", DEFAULTS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_half_precision(self, default: torch.dtype, dtype: torch.dtype) -> None:
        preds, target, names = study(7)
        expected = expected_of(preds, target, names, "skip")
        with default_dtype(default):
            metrics = torch.nn.ModuleDict({name.replace(" ", "_"): make() for name, make in MAKES.items()}).to(dtype)
            for name in MAKES:
                metric = metrics[name.replace(" ", "_")]
                for p, t, patient in batches(preds, target, names, seed=1):
                    metric.update(p.to(dtype), t, patient)
                value = metric.compute()
                assert value.dtype == torch.float32
                assert value.item() == pytest.approx(expected[name], rel=1e-6)

    def test_torchs_default_type_is_never_read(self) -> None:
        with default_is_never_read():
            for make in MAKES.values():
                metric = make()
                metric.update(SOMETHING.float(), SOMETHING.to(torch.uint16), ["anna"])
                metric.compute()
                metric.reset()
                metric(SOMETHING, SOMETHING, ["anna"])

    @EVERY
    @pytest.mark.parametrize("convert", ["to", "half", "set_dtype"])
    def test_states_keep_their_types(self, make, convert: str) -> None:
        metric = make()
        preds, target, names = study(2)
        metric.update(preds[:5], target[:5], names[:5])
        getattr(metric, convert)(*([] if convert == "half" else [torch.float16]))
        metric.update(preds[5:], target[5:], names[5:])
        expected = make()
        expected.update(preds, target, names)
        assert metric.compute() == expected.compute()
        assert {rows.dtype for rows in metric.metric_state["rows of patients 0.5"]} == {torch.int64}

    def test_more_pixels_than_half_precision_counts(self) -> None:
        target = torch.ones(2, 1, 300, 300, dtype=torch.bool)
        preds = target.clone()
        preds[..., :100, :] = False
        with default_dtype(torch.float16):
            metric = PatientDiceScore()
            metric.update(preds, target, ["anna"] * 2)
            assert metric.compute().item() == pytest.approx(0.8, rel=1e-7)


class TestLife:
    preds, target, names = study(4)

    def updated(self, make: Any, *parts: slice) -> Any:
        metric = make()
        for part in parts:
            metric.update(self.preds[part], self.target[part], self.names[part])
        return metric

    @EVERY
    def test_copies(self, make) -> None:
        metric = self.updated(make, slice(0, 4), slice(4, None))
        for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.to("cpu")):
            torch.testing.assert_close(twin.compute(), metric.compute())
        before, twin = metric.compute(), metric.clone()
        for _ in range(3):
            twin.update(SOMETHING, SOMETHING.roll(1, -1), [None])
            twin.update(NOTHING, NOTHING, [None])
        metric._computed = None
        assert metric.compute() == before
        assert twin.compute() != before
        twin.reset()
        twin.update(self.preds, self.target, self.names)
        torch.testing.assert_close(twin.compute(), before)

    @EVERY
    def test_state_dict(self, make) -> None:
        assert make().state_dict() == {}
        metric, restored = self.updated(make, slice(0, 4), slice(4, 7)), make()
        metric.persistent(True)
        restored.persistent(True)
        restored.load_state_dict(metric.state_dict())
        restored.update(self.preds[7:], self.target[7:], self.names[7:])
        torch.testing.assert_close(restored.compute(), self.updated(make, slice(None)).compute())

    @pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this torchmetrics merges no states")
    @EVERY
    def test_merge(self, make) -> None:
        metric = self.updated(make, slice(0, 6))
        metric.merge_state(self.updated(make, slice(6, 8), slice(8, None)))
        torch.testing.assert_close(metric.compute(), self.updated(make, slice(None)).compute())

    @EVERY
    def test_forward(self, make) -> None:
        metric = make()
        for part in (slice(0, 6), slice(6, 7), slice(7, None)):
            batch = metric(self.preds[part], self.target[part], self.names[part])
            torch.testing.assert_close(batch, self.updated(make, part).compute())
        torch.testing.assert_close(metric.compute(), self.updated(make, slice(None)).compute())

    def test_inference_mode(self) -> None:
        metric = PatientDiceScore()
        with torch.inference_mode():
            metric.reset()
            metric.update(self.preds[:6], self.target[:6], self.names[:6])
        metric.update(self.preds[6:], self.target[6:], self.names[6:])
        assert metric.compute() == self.updated(PatientDiceScore, slice(None)).compute()

    @pytest.mark.parametrize("first", [NOTHING, SOMETHING], ids=["empty", "perfect"])
    def test_collection_keeps_metrics_apart_and_shares_states(self, first: Tensor) -> None:
        makes: dict[str, Any] = {
            **MAKES,
            "strict": lambda: PatientDiceScore(threshold=0.9),
            "strict count": lambda: PatientCount(threshold=0.9),
            "best": lambda: PatientDiceScore(empty="best"),
            "of truth": lambda: PatientCount(empty="skip_true"),
            "masks": MaskCount,
            "masks left out": lambda: MaskCount(left_out=True),
            "strict masks": lambda: MaskCount(threshold=0.9),
            "true masks": lambda: MaskCount(empty="skip_true"),
            "dice of masks": DiceScore,
        }
        collection = MetricCollection({name: make() for name, make in makes.items()}, prefix="val/")
        preds = torch.rand(len(self.names), 2, 6, 5, generator=torch.Generator().manual_seed(1)) * self.preds
        parts = [(first, first, ["anna"]), (preds[:8], self.target[:8], self.names[:8])]
        parts.append((preds[8:], self.target[8:], self.names[8:]))
        for epoch in range(2):
            for p, t, names in parts:
                collection.update(p, t, patient=names)
            values = collection.compute()
            for name, make in makes.items():
                metric = make()
                for p, t, names in parts:
                    metric.update(p, t, *([names] if isinstance(metric, PatientMetric) else []))
                torch.testing.assert_close(values[f"val/{name}"], metric.compute(), msg=f"{name} in epoch {epoch}")
            collection.reset()
        groups = {frozenset(group) for group in collection.compute_groups.values()}
        assert groups == {
            frozenset({*MAKES, "best", "of truth"}),
            frozenset({"strict", "strict count"}),
            frozenset({"masks", "masks left out"}),
            *(frozenset({name}) for name in ("strict masks", "true masks", "dice of masks")),
        }

    def test_collection_of_lightning(self) -> None:
        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.metrics = MetricCollection({"dice": PatientDiceScore(), "patients": PatientCount()})
                self.masks = MaskCount()

            def test_step(self, batch: Any) -> None:
                preds, target, names = batch
                self.metrics.update(preds, target, patient=list(names))
                self.masks.update(preds, target)
                self.log_dict(self.metrics)
                self.log("masks", self.masks)

        data = list(zip(self.preds, self.target, [str(name) for name in self.names], strict=True))
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            (logged,) = trainer.test(Module(), DataLoader(data, batch_size=4), verbose=False)
        expected = expected_of(self.preds, self.target, [str(name) for name in self.names], "skip")
        masks = DiceScore()
        masks.update(self.preds, self.target)
        assert logged == pytest.approx(
            {"dice": expected["dice"], "patients": expected["counted"], "masks": int(masks.counted)}, rel=1e-6
        )


@pytest.mark.parametrize("together", [True, False], ids=["one state", "states apart"])
def test_two_processes(together: bool) -> None:
    """Slices of a patient in two processes, or none in one of them, give what they give in one process."""
    records = run_distributed(ddp_patients.score, together)
    for scenario, numbers in ddp_patients.SCENARIOS.items():
        ranks = [record[scenario] for record in records]
        parts = [ddp_patients.batch_of(scenario, number) for number in range(sum(numbers))]
        names = [name for part in parts for name in part[2]]
        preds, target = torch.cat([part[0] for part in parts]) >= 0.5, torch.cat([part[1] for part in parts])
        expected = expected_of(preds, target, names, "skip")
        presence = (preds | target).flatten(2).any(dim=2)
        values = {
            **{name: expected[name] for name in MAKES},
            "best": expected_of(preds, target, names, "best")["dice"],
            "masks": int(presence.sum()),
            "masks left out": int((~presence).sum()),
        }
        for record in ranks:
            assert record["values"] == pytest.approx(values, rel=1e-6, nan_ok=True)
            assert record["synchronised"] == expected["states"]
            assert record["reset"] == [0, 0]
        for record, count in zip(ranks, numbers, strict=True):
            assert count > 0 or record["own"] == [0, 0]
        warned = [len(record["warnings"]) for record in ranks]
        assert warned == ([1, 0] if scenario == "nothing" else [0, 0]), [record["warnings"] for record in ranks]


@pytest.mark.gpu
def test_on_cuda() -> None:
    preds, target, names = study(8)
    for make in MAKES.values():
        metric, on_cpu = make().cuda(), make()
        on_device = preds.cuda(), target.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            metric.update(*on_device, names)
            metric(*on_device, names)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for _ in range(2):
            on_cpu.update(preds, target, names)
        torch.testing.assert_close(metric.compute().cpu(), on_cpu.compute())
