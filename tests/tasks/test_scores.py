"""Which scores a segmentation logs: by default, chosen by the user, for each class and each patient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.classification import BinaryJaccardIndex
from torchmetrics.segmentation import GeneralizedDiceScore, MeanIoU

from lightning_znorm.cli import main
from lightning_znorm.metrics import DiceScore, HausdorffDistance, PatientDiceScore, TverskyIndex
from lightning_znorm.tasks import SegmentationTask
from tests.distributed import run_distributed
from tests.tasks.ddp_scores import PATIENTS, Slices, task, test_in_two_processes, with_names_in_one_process
from tests.trainers import trainer

test_in_two_processes.__test__ = False
NAMES = ["dice", "dice_foreground", "dice_per_patient", "hausdorff", "tversky"]
COUNTS = ["masks_counted", "masks_foreground", "masks_left_out", "patients_counted", "patients_left_out"]


def by_hand() -> dict[str, float]:
    """Return the scores of `Slices` by their definitions, in NumPy, one mask after the other."""
    data = Slices()
    predicted, true = data.images.argmax(1).numpy(), data.masks[:, 0].numpy()
    found: dict[str, list[float]] = {}

    def add(name: str, number: int, score: float) -> None:
        for key in (name, f"{name}_{'kidney' if number == 1 else 'tumour'}"):
            found.setdefault(key, []).append(score)

    def dice(p: np.ndarray, t: np.ndarray) -> float:
        return 2 * (p & t).sum() / (p.sum() + t.sum())

    counts = dict.fromkeys(COUNTS, 0.0)
    for number in (1, 2):
        for p, t in zip(predicted == number, true == number, strict=True):
            if not p.any() and not t.any():
                counts["masks_left_out"] += 1
                continue
            counts["masks_counted"] += 1
            add("dice", number, dice(p, t))
            hits = (p & t).sum()
            add("tversky", number, hits / (hits + 0.3 * (p & ~t).sum() + 0.7 * (~p & t).sum()) if hits else 0.0)
            if t.any():
                counts["masks_foreground"] += 1
                add("dice_foreground", number, dice(p, t))
            if p.any() and t.any():
                points = [np.argwhere(mask)[:, None] for mask in (p, t)]
                distances = np.sqrt(((points[0] - points[1].swapaxes(0, 1)) ** 2).sum(-1))
                add("hausdorff", number, max(distances.min(0).max(), distances.min(1).max()))
            else:
                add("hausdorff", number, np.hypot(5, 6))
    for patient in sorted(set(PATIENTS)):
        rows = [row for row, other in enumerate(PATIENTS) if other == patient]
        scored = 0
        for number in (1, 2):
            p, t = predicted[rows] == number, true[rows] == number
            if p.any() or t.any():
                scored += 1
                add("dice_per_patient", number, dice(p, t))
        counts["patients_counted" if scored else "patients_left_out"] += 1
    return {name: float(np.mean(scores)) for name, scores in found.items()} | counts


class Mean(Metric):
    """A metric of a user: the mean of the predicted masks."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.total += preds.sum()
        self.count += preds.numel()

    def compute(self) -> Tensor:
        return self.total / self.count


def listed(samples: list[Any]) -> tuple[Tensor, Tensor, dict[str, list[Any]]]:
    """Collate samples whose patients may be None."""
    images, masks, said = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks), {"patient": [each["patient"] for each in said]}


class TestDefault:
    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_by_hand(self, stage: str, batch_size: int):
        made = task(class_names=["kidney", "tumour"])
        evaluate = getattr(trainer(), {"val": "validate", "test": "test"}[stage])
        for _ in range(2):  # nothing is left of the first time
            (result,) = evaluate(made, DataLoader(Slices(), batch_size=batch_size), verbose=False)
            del result[f"{stage}/loss"]
            expected = {f"{stage}/{name}": pytest.approx(value, rel=1e-6) for name, value in by_hand().items()}
            assert result == expected
        assert result[f"{stage}/patients_left_out"] == 1
        assert len(set(result.values())) >= 12  # the scores differ from each other

    def test_two_processes(self):
        first, second = run_distributed(test_in_two_processes)
        expected = {f"test/{name}": pytest.approx(value, rel=1e-6) for name, value in by_hand().items()}
        for result in (first, second):
            assert {name: value for name, value in result.items() if name != "test/loss"} == expected

    def test_two_processes_of_which_one_names_no_patients(self):
        first, second = run_distributed(with_names_in_one_process)
        assert first == second
        assert first["test/patients_counted"] + first["test/patients_left_out"] == 5  # anna, and four of their own

    def test_without_patients(self):
        (result,) = trainer().test(task(), DataLoader(Slices(patients=None), batch_size=3), verbose=False)
        assert not [name for name in result if "patient" in name]
        assert result["test/dice_1"] == pytest.approx(by_hand()["dice_kidney"])

    @pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
    def test_some_without_a_patient_are_patients_of_their_own(self, batch_size: int):
        patients = ["anna", None, None, None, None, None, "anna", None]
        (result,) = trainer().test(
            task(), DataLoader(Slices(patients=patients), batch_size, collate_fn=listed), verbose=False
        )
        assert result["test/patients_counted"] + result["test/patients_left_out"] == 7
        data, scores = Slices(), []
        for rows in ([0, 6], [1], [2], [3], [4], [5], [7]):
            for number in (1, 2):
                p, t = data.images[rows].argmax(1) == number, data.masks[rows, 0] == number
                if p.any() or t.any():
                    scores.append((2 * (p & t).sum() / (p.sum() + t.sum())).item())
        assert result["test/dice_per_patient"] == pytest.approx(np.mean(scores))

    def test_one_class_has_no_scores_of_its_own(self):
        images = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        data = DataLoader([(image, (image > 0.5).long()) for image in images], batch_size=2)
        (result,) = trainer().test(SegmentationTask(nn.Conv2d(1, 1, 1)), data, verbose=False)
        names = {*NAMES, *COUNTS, "loss"} - {"dice_per_patient", "patients_counted", "patients_left_out"}
        assert set(result) == {f"test/{name}" for name in names}

    def test_scores_of_each_mask(self):
        made = task(class_names=["kidney", "tumour"])
        returned: list[dict[str, Tensor]] = []

        class Noting(SegmentationTask):
            def test_step(self, *args: Any) -> Any:
                returned.append(super().test_step(*args))
                return returned[-1]

        made.__class__ = Noting
        (result,) = trainer().test(made, DataLoader(Slices(), batch_size=3), verbose=False)
        assert set(returned[0]["scores"]) == set(NAMES) - {"dice_per_patient"}
        for name in returned[0]["scores"]:
            scores = torch.cat([each["scores"][name] for each in returned])
            assert scores.shape == (8, 2)
            assert result[f"test/{name}"] == pytest.approx(scores.nanmean().item())
            assert result[f"test/{name}_tumour"] == pytest.approx(scores[:, 1].nanmean().item())

    def test_progress_bar(self):
        run = trainer()
        run.test(task(class_names=["kidney", "tumour"]), DataLoader(Slices(), batch_size=3), verbose=False)
        shown = {name.removeprefix("test/") for name in run.progress_bar_metrics}
        assert shown == {*NAMES, "loss"}


class TestPatientsInCallbacks:
    def test_a_checkpoint_and_an_early_stopping_follow(self, tmp_path: Path):
        best = ModelCheckpoint(tmp_path, monitor="val/dice_per_patient", mode="max")
        stopping = EarlyStopping("val/dice_per_patient", mode="max", patience=1)
        run = trainer(max_epochs=9, callbacks=[best, stopping], enable_checkpointing=True)
        data = DataLoader(Slices(), batch_size=3)
        run.fit(task(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)), data, data)
        assert run.current_epoch == 2  # the weights stay, so the first epoch is the best
        assert best.best_model_score.item() == pytest.approx(by_hand()["dice_per_patient"])

    @pytest.mark.filterwarnings("ignore:.* is NaN. all .* are empty:UserWarning")
    def test_nan_is_no_divergence(self):
        stopping = EarlyStopping("val/dice_per_patient", mode="max", patience=3)
        empty = Slices()
        empty.masks.zero_()
        empty.images[:, 0] = 9
        run = trainer(max_epochs=2, callbacks=[stopping])
        run.fit(
            task(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0)),
            DataLoader(empty, 4),
            DataLoader(empty, 4),
        )
        assert run.current_epoch == 2
        assert run.callback_metrics["val/dice_per_patient"].isnan()


class TestChosen:
    def test_in_place_of_the_default_ones(self):
        chosen = {
            "hd95": HausdorffDistance(percentile=95),
            "recall": TverskyIndex(alpha=0, beta=1),
            "monai": DiceScore(empty="best"),
            "volume": PatientDiceScore(),
            "jaccard": BinaryJaccardIndex(),
        }
        (result,) = trainer().test(task(metrics=chosen), DataLoader(Slices(), batch_size=3), verbose=False)
        of_classes = {f"{name}_{each}" for name in chosen for each in "12" if name != "jaccard"}
        assert set(result) == {f"test/{name}" for name in {*chosen, *of_classes, *COUNTS, "loss"}}
        data = Slices()
        classes = torch.tensor([1, 2]).view(2, 1, 1)
        preds, target = data.images.argmax(1, keepdim=True) == classes, data.masks == classes
        assert result["test/jaccard"] == pytest.approx(((preds & target).sum() / (preds | target).sum()).item())
        by_class = HausdorffDistance(percentile=95)(preds[:, :1], target[:, :1])
        assert result["test/hd95_1"] == pytest.approx(by_class.item())
        sizes = [(m.flatten(2).sum(2)).double() for m in (preds & target, preds, target)]
        dice = torch.where(sizes[1] + sizes[2] > 0, 2 * sizes[0] / (sizes[1] + sizes[2]), 1.0)
        assert result["test/monai"] == pytest.approx(dice.mean().item())
        assert result["test/volume"] == pytest.approx(by_hand()["dice_per_patient"])

    def test_distances_in_millimetres(self):
        class Spaced(Slices):
            def __getitem__(self, index: int) -> Any:
                image, mask, said = super().__getitem__(index)
                return image, mask, {**said, "spacing": np.array([3.0, 0.5 + index])}

        chosen = {"hd": HausdorffDistance(spacing="image")}
        (result,) = trainer().test(task(metrics=chosen), DataLoader(Spaced(), batch_size=3), verbose=False)
        scores, data = [], Slices()
        for index in range(8):
            for number in (1, 2):
                metric = HausdorffDistance(spacing=(3.0, 0.5 + index))
                p, t = data.images[[index]].argmax(1, keepdim=True) == number, data.masks[[index]] == number
                scores.append(metric.score_each(p, t))
        assert result["test/hd"] == pytest.approx(torch.cat(scores).nanmean().item(), rel=1e-6)
        with pytest.raises(ValueError, match="spacing"):
            trainer().test(task(metrics=chosen), DataLoader(Slices(), batch_size=3), verbose=False)

    def test_patients_that_no_batch_names(self):
        data = DataLoader(Slices(patients=None), batch_size=3)
        with pytest.raises(ValueError, match=r"^metrics\['volume'\] scores patients, and the batches name none"):
            trainer().test(task(metrics={"volume": PatientDiceScore()}), data, verbose=False)

    def test_own_metrics_get_masks_as_bool(self):
        class Right(Mean):
            def update(self, preds: Tensor, target: Tensor) -> None:
                super().update(preds[target], target)

        (result,) = trainer().test(task(metrics={"right": Right()}), DataLoader(Slices(), 3), verbose=False)
        classes, data = torch.tensor([1, 2]).view(2, 1, 1), Slices()
        preds, target = data.images.argmax(1, keepdim=True) == classes, data.masks == classes
        assert result["test/right"] == pytest.approx(preds[target].float().mean().item())

    def test_own_scores_with_an_update_of_their_own(self):
        class Old(DiceScore):
            def update(self, preds: Tensor, target: Tensor) -> None:
                super().update(preds, target)

        chosen = {"old": Old(), "dice": DiceScore(), "dice_x": Mean(), "mean_1": DiceScore()}
        (result,) = trainer().test(task(metrics=chosen), DataLoader(Slices(), 3), verbose=False)
        assert result["test/old"] == result["test/dice"] == result["test/mean_1"]
        assert result["test/old_1"] == result["test/dice_1"]

    @pytest.mark.parametrize(
        "metric", [MeanIoU(2, input_format="one-hot"), GeneralizedDiceScore(2)], ids=["iou", "dice"]
    )
    def test_of_torchmetrics(self, metric: Metric):
        (result,) = trainer().test(task(metrics={"theirs": metric}), DataLoader(Slices(), 8), verbose=False)
        classes, data = torch.tensor([1, 2]).view(2, 1, 1), Slices()
        preds, target = data.images.argmax(1, keepdim=True) == classes, data.masks == classes
        assert result["test/theirs"] == pytest.approx(metric(preds.long(), target.long()).item())

    def test_given_metrics_are_not_changed(self):
        metric = DiceScore()
        made = task(metrics={"dice": metric})
        trainer().test(made, DataLoader(Slices(), batch_size=3), verbose=False)
        assert not metric.update_called
        assert not [name for name in made.state_dict() if "metric" in name]

    @pytest.mark.parametrize(
        ("metrics", "error", "message"),
        [
            ([DiceScore()], TypeError, "metrics are metrics by name, such as .* got list"),
            ({}, ValueError, "metrics holds no metric"),
            ({"dice": 3}, TypeError, r"metrics\['dice'\] must be a metric of torchmetrics .* got int"),
            ({"": DiceScore()}, ValueError, "cannot hold the name ''"),
            ({"a/b": DiceScore()}, ValueError, "cannot hold the name 'a/b'"),
            ({"loss": DiceScore()}, ValueError, "cannot hold the name 'loss'"),
            ({"pixels": DiceScore()}, ValueError, "cannot hold the name 'pixels'"),
            ({"masks_counted": DiceScore()}, ValueError, "cannot hold the name 'masks_counted'"),
            ({"slice": DiceScore()}, ValueError, "cannot hold the name 'slice'"),
            ({"dice": DiceScore(threshold=0.1)}, ValueError, r"metrics\['dice'\] has threshold=0.1, .* of the task"),
            ({"dice": DiceScore(), "dice_1": DiceScore()}, ValueError, "'dice_1' would be the name of two scores"),
        ],
    )
    def test_wrong_ones(self, metrics: Any, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            task(metrics=metrics)

    @pytest.mark.parametrize(
        ("names", "error", "message"),
        [
            (["a"], ValueError, r"must hold 2 names \(all but the background\)"),
            (["a", "a"], ValueError, "must be different names"),
            (["a", "b/c"], ValueError, "must be different names without '/'"),
            ("ab", TypeError, "is a list of names"),
            ([1, 2], TypeError, "is a list of names"),
        ],
    )
    def test_wrong_names_of_classes(self, names: Any, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            task(class_names=names)

    def test_names_of_overlapping_classes(self):
        made = SegmentationTask(nn.Conv2d(1, 2, 1), num_classes=2)
        assert made.class_names == ["0", "1"]
        assert task().class_names == ["1", "2"]


def test_from_yaml(fake_lgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {
            "class_path": "SegmentationTask",
            "init_args": {
                "model": "attention_unet",
                "model_kwargs": {"channels": [4, 8], "strides": [2]},
                "ignore_index": 255,
                "metrics": {
                    "dice_per_patient": {"class_path": "PatientDiceScore"},
                    "hd95": {
                        "class_path": "lightning_znorm.metrics.HausdorffDistance",
                        "init_args": {"percentile": 95, "spacing": [1.0, 0.5]},
                    },
                    "tversky": {"class_path": "TverskyIndex", "init_args": {"alpha": 0.1, "beta": 0.9}},
                    "jaccard": {"class_path": "torchmetrics.classification.BinaryJaccardIndex"},
                    "mean": {"class_path": "tests.tasks.test_scores.Mean"},
                },
                "inferer": {
                    "class_path": "monai.inferers.SlidingWindowInferer",
                    "init_args": {"roi_size": [16, 16], "sw_batch_size": 4, "overlap": 0.5},
                },
            },
        },
        "data": {
            "class_path": "LGGDataModule",
            "init_args": {"root": str(fake_lgg), "batch_size": 4, "val_fraction": 0.3, "test_fraction": 0.3},
        },
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}},
            "callbacks+": [{"class_path": "LastCheckpoint"}],
        },
    }
    Path("own.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", "own.yaml"])
    assert "val/dice_per_patient" in capsys.readouterr().out
    (saved,) = Path("logs").rglob("config.yaml")
    found = yaml.safe_load(saved.read_text())["model"]["init_args"]
    assert found["metrics"]["hd95"]["init_args"]["spacing"] == [1.0, 0.5]
    assert found["inferer"]["init_args"]["overlap"] == 0.5
    (checkpoint,) = Path("logs").rglob("*.ckpt")
    loaded = SegmentationTask.load_from_checkpoint(checkpoint)
    assert set(loaded.metrics) == {"dice_per_patient", "hd95", "tversky", "jaccard", "mean"}
    assert (loaded.metrics["hd95"].percentile, loaded.metrics["tversky"].beta) == (95, 0.9)
    assert loaded.inferer.roi_size == [16, 16]
    main(["test", "--config", str(saved), "--ckpt_path", str(checkpoint)])
    out = capsys.readouterr().out
    assert "test/hd95" in out
    assert "test/mean" in out
    assert "test/hausdorff" not in out
