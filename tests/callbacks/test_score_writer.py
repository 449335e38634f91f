"""scores.csv: a line for each tested case, whose mean is what is logged."""

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm import MaskOverlay, ScoreWriter
from lightning_znorm.batches import Cases, cases_of
from lightning_znorm.callbacks.scores import ScoreTable, case_scores, opened
from lightning_znorm.cli import main
from lightning_znorm.metrics import DiceScore, HausdorffDistance, TverskyIndex
from lightning_znorm.tasks import SegmentationTask
from tests.callbacks.ddp_masks import score
from tests.distributed import run_distributed
from tests.medical import write_lgg
from tests.trainers import trainer

CASE = ["image", "patient", "slice", "class"]
IN_PIXELS = ["dice", "tversky", "hausdorff", "hd95"]
SIZES = ["predicted_pixels", "true_pixels"]


def blobs(count: int = 6, classes: int = 1, size: tuple[int, ...] = (16, 20), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return predicted and true masks. The first pair is empty, the second prediction is, and the third truth."""
    generator = torch.Generator().manual_seed(seed)
    preds, target = (torch.rand(count, classes, *size, generator=generator) > 0.9 for _ in range(2))
    preds[:2], target[:1], target[2:3] = False, False, False
    return preds, target


class Module(LightningModule):
    """A module whose batches hold images, predicted and true masks, and maybe a word about the cases."""

    def __init__(self, score: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.score = score

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        preds, target = batch[1:3]
        outputs = {"preds": preds, "target": target}
        return outputs if self.score is None else {**outputs, "scores": self.score(preds, target)}


def batches(preds: Tensor, target: Tensor, size: int = 4, **said: list[Any]) -> list[tuple[Any, ...]]:
    images = torch.zeros(len(preds), 3, *preds.shape[2:])
    return [
        (images[part], preds[part], target[part], {key: values[part] for key, values in said.items()})
        for part in (slice(start, start + size) for start in range(0, len(preds), size))
    ]


def run(folder: Path, module: LightningModule, *loaders: Iterable[Any], **kwargs: Any) -> dict[str, float]:
    made = trainer(callbacks=[ScoreWriter()], default_root_dir=folder, **kwargs)
    loaded = [DataLoader(loader, batch_size=None) for loader in loaders]
    return made.test(module, loaded if len(loaded) > 1 else loaded[0], verbose=False)[0]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) if row[name] else math.nan for row in rows]


class TestLines:
    def test_of_each_case(self, tmp_path: Path):
        preds, target = blobs()
        patients = ["anna", "anna", "ben", "ben", "ben", "cem"]
        named = batches(preds, target, name=list("abcdef"), patient=patients, slice=[4, 5, 1, 2, 3, 9])
        run(tmp_path, Module(), named)
        rows = read(tmp_path / "scores.csv")
        assert list(rows[0]) == CASE + IN_PIXELS + SIZES
        assert [row["image"] for row in rows] == list("abcdef")
        assert [row["patient"] for row in rows] == patients
        assert [row["slice"] for row in rows] == ["4", "5", "1", "2", "3", "9"]
        assert {row["class"] for row in rows} == {"0"}
        metrics = (DiceScore(), TverskyIndex(), HausdorffDistance(), HausdorffDistance(percentile=95))
        for name, metric in zip(IN_PIXELS, metrics, strict=True):
            expected = metric.score_each(preds, target).flatten().tolist()
            assert column(rows, name) == pytest.approx(expected, nan_ok=True, rel=1e-15), name
            assert rows[0][name] == ""
        assert column(rows, "predicted_pixels") == preds.flatten(1).sum(dim=1).tolist()
        assert column(rows, "true_pixels") == target.flatten(1).sum(dim=1).tolist()

    def test_of_each_class(self, tmp_path: Path):
        preds, target = blobs(classes=3)
        module = Module()
        module.class_names = ["oedema", "core", "cyst"]
        run(tmp_path, module, batches(preds, target))
        rows = read(tmp_path / "scores.csv")
        assert [row["class"] for row in rows] == module.class_names * 6
        assert [row["image"] for row in rows] == [str(number) for number in range(6) for _ in range(3)]
        assert column(rows, "dice") == pytest.approx(
            DiceScore().score_each(preds, target).flatten().tolist(), nan_ok=True
        )
        assert column(rows, "true_pixels") == target.flatten(2).sum(dim=2).flatten().tolist()

    @pytest.mark.parametrize("names", [["oedema"], "abc", None, 3])
    def test_names_that_do_not_fit(self, tmp_path: Path, names: Any):
        module = Module()
        module.class_names = names
        run(tmp_path, module, batches(*blobs(classes=3)))
        assert [row["class"] for row in read(tmp_path / "scores.csv")][:3] == ["0", "1", "2"]

    def test_number_is_that_of_the_overlay(self, tmp_path: Path):
        preds, target = blobs(7)
        made = trainer(callbacks=[ScoreWriter(), MaskOverlay(cases=[5])], default_root_dir=tmp_path)
        overlay = made.callbacks[-1]
        kept: list[str] = []
        overlay._drawn = lambda: kept.extend(case.caption for case in overlay._kept) or []
        made.test(Module(), DataLoader(batches(preds, target), batch_size=None), verbose=False)
        row = read(tmp_path / "scores.csv")[5]
        assert row["image"] == "5"
        assert kept == [f"case 5   Dice {float(row['dice']):.3f}   Hausdorff {float(row['hausdorff']):.1f} px"]

    def test_millimetres(self, tmp_path: Path):
        preds, target = blobs(size=(6, 8, 10))
        spacing = [(3.0, 0.5, 0.25)] * 3 + [(1.0, 2.0, 2.0)] * 3
        run(tmp_path, Module(), batches(preds, target, spacing=spacing))
        rows = read(tmp_path / "scores.csv")
        assert list(rows[0]) == [*CASE, *IN_PIXELS, "hausdorff_mm", "hd95_mm", *SIZES]
        for name, percentile in (("hausdorff_mm", None), ("hd95_mm", 95)):
            expected = [
                HausdorffDistance(percentile, steps).score_each(*pair).item()
                for steps, *pair in zip(spacing, preds.split(1), target.split(1), strict=True)
            ]
            assert column(rows, name) == pytest.approx(expected, nan_ok=True), name

    @pytest.mark.parametrize("unknown", [None, (1.0, 0.0), (1.0, math.inf), (math.nan, 1.0)])
    def test_millimetres_of_no_spacing(self, tmp_path: Path, unknown: Any):
        """The columns of the table are those of all batches."""
        preds, target = blobs(4)
        run(tmp_path, Module(), batches(preds, target, size=2, spacing=[unknown, (2.0, 2.0), (2.0, 2.0), (2.0, 2.0)]))
        rows = read(tmp_path / "scores.csv")
        assert list(rows[0]) == [*CASE, *IN_PIXELS, *SIZES, "hausdorff_mm", "hd95_mm"]
        assert [row["hd95_mm"] == "" for row in rows] == [True, True, False, False]
        assert column(rows[2:], "hausdorff_mm") == pytest.approx([2 * each for each in column(rows[2:], "hausdorff")])

    def test_several_loaders(self, tmp_path: Path):
        first, second = blobs(3), blobs(2, seed=1)
        run(tmp_path, Module(), batches(*first), batches(*second, name=["x", "y"]))
        rows = read(tmp_path / "scores.csv")
        assert list(rows[0]) == ["loader", *CASE, *IN_PIXELS, *SIZES]
        assert [(row["loader"], row["image"]) for row in rows] == [
            *(("0", str(number)) for number in range(3)),
            *(("1", name) for name in "xy"),
        ]

    @pytest.mark.parametrize("name", ['a,b\n"c".tif', "häß.tif", "\udce4.tif"])
    def test_any_name(self, tmp_path: Path, name: str):
        run(tmp_path, Module(), batches(*blobs(1), name=[name], patient=[name]))
        (row,) = read(tmp_path / "scores.csv")
        assert row["image"] == row["patient"] == name

    def test_dictionaries(self, tmp_path: Path):
        preds, target = blobs(2)

        class Own(LightningModule):
            def test_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
                return {"preds": preds, "target": batch["label"]}

        batch = {"image": torch.zeros(2, 1, 16, 20), "label": target, "name": ["a", "b"]}
        run(tmp_path, Own(), [batch])
        assert [row["image"] for row in read(tmp_path / "scores.csv")] == ["a", "b"]


class TestLoggedScores:
    def test_are_taken_as_they_are(self, tmp_path: Path):
        preds, target = blobs()
        logged = {"dice": torch.rand(6, 1, dtype=torch.float64), "mine": torch.rand(6, 1)}
        logged["mine"][2] = torch.nan
        parts = iter([slice(0, 4), slice(4, 6)])

        def score(*_: Tensor) -> dict[str, Tensor]:
            part = next(parts)
            return {name: values[part] for name, values in logged.items()}

        run(tmp_path, Module(score), batches(preds, target))
        rows = read(tmp_path / "scores.csv")
        assert list(rows[0]) == [*CASE, "dice", "mine", *IN_PIXELS[1:], *SIZES]
        for name, values in logged.items():
            written, expected = column(rows, name), values.flatten().tolist()
            assert str(written) == str(expected)  # every digit
        assert rows[2]["mine"] == ""

    @pytest.mark.parametrize("returned", [True, False])
    @pytest.mark.parametrize("classes", [1, 2])
    def test_a_mean_over_the_file_is_what_is_logged(self, tmp_path: Path, classes: int, returned: bool):
        """Whether the scores come from the task or from this callback."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(9, classes, 24, 24, generator=generator)
        masks = (images.roll(1, dims=-1) > 0.5).float()
        images[0], masks[0], masks[1] = 0, 0, 0

        class Task(SegmentationTask):
            def test_step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                outputs = super().test_step(*args, **kwargs)
                if not returned:
                    outputs.pop("scores", None)
                return outputs

        task = Task(torch.nn.Identity(), num_classes=classes, in_chans=classes, threshold=0.65)
        made = trainer(callbacks=[ScoreWriter()], default_root_dir=tmp_path)
        (logged,) = made.test(task, DataLoader(TensorDataset(images, masks), batch_size=4), verbose=False)
        rows = read(tmp_path / "scores.csv")
        assert len(rows) == 9 * classes
        assert rows[0]["dice"] == ""
        for name in ("dice", "tversky", "hausdorff"):
            assert np.nanmean(column(rows, name)) == pytest.approx(logged[f"test/{name}"], rel=1e-6), name

    @pytest.mark.parametrize(
        ("scores", "error", "message"),
        [
            (torch.zeros(4, 1), TypeError, "'scores' .* must be a mapping .* and is a Tensor"),
            ({"dice": [0.5] * 4}, TypeError, "must be a mapping of names to tensors"),
            ({"dice": torch.zeros(4)}, ValueError, r"'dice' have shape \(4,\), and the masks ask for \(4, 1\)"),
            ({"slice": torch.zeros(4, 1)}, ValueError, "called 'slice', which is another column"),
            ({"loader": torch.zeros(4, 1)}, ValueError, "called 'loader', which is another column"),
        ],
    )
    def test_that_are_none(self, tmp_path: Path, scores: Any, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            run(tmp_path, Module(lambda *_: scores), batches(*blobs()))


class TestFile:
    def test_beside_the_logs(self, tmp_path: Path):
        logger = CSVLogger(tmp_path)
        run(tmp_path, Module(), batches(*blobs()), logger=logger)
        assert len(read(Path(logger.log_dir) / "scores.csv")) == 6

    def test_a_second_test_replaces_it(self, tmp_path: Path):
        for count in (6, 4):
            run(tmp_path, Module(), batches(*blobs(count)))
            assert [row["image"] for row in read(tmp_path / "scores.csv")] == [str(each) for each in range(count)]

    def test_is_written_batch_by_batch(self, tmp_path: Path):
        lengths = []

        class Watching(Module):
            def test_step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                lengths.append(len(read(tmp_path / "scores.csv")))
                return super().test_step(*args, **kwargs)

        run(tmp_path, Watching(), batches(*blobs(7), size=3))
        assert lengths == [0, 3, 6]

    def test_fast_dev_run_leaves_it_alone(self, tmp_path: Path):
        run(tmp_path, Module(), batches(*blobs()))
        run(tmp_path, Module(), batches(*blobs(2)), fast_dev_run=True)
        assert len(read(tmp_path / "scores.csv")) == 6

    def test_two_processes(self, tmp_path: Path):
        """Five cases: each process writes three, so the first one is there twice."""
        run_distributed(score, tmp_path)
        images = [[row["image"] for row in read(tmp_path / "logs" / f"scores-{rank}.csv")] for rank in (0, 1)]
        assert images == [["0", "2", "4"], ["1", "3", "5"]]
        assert not (tmp_path / "logs" / "scores.csv").exists()

    def test_table_grows_in_both_directions(self, tmp_path: Path):
        table = ScoreTable(tmp_path / "new folder" / "table.csv", ["image"])
        assert read(table.path) == []
        table.write([{"image": "a"}, {"image": "b", "dice": 0.1}])
        table.write([{"dice": 1 / 3, "image": "\udce4"}])
        table.write([{"image": "c", "pixels": 3, "dice": None}])
        with opened(table.path, "r") as file:
            rows = list(csv.reader(file))
        assert rows == [
            ["image", "dice", "pixels"],
            ["a", "", ""],
            ["b", "0.1", ""],
            ["\udce4", "0.3333333333333333", ""],
            ["c", "", "3"],
        ]


class TestOtherOutputs:
    class Returning(LightningModule):
        def __init__(self, outputs: Any) -> None:
            super().__init__()
            self.outputs = outputs

        def test_step(self, batch: Any) -> Any:
            return self.outputs

    @pytest.mark.parametrize(
        ("outputs", "error", "message"),
        [
            (None, TypeError, "ScoreWriter scores what test_step returns, .* and was given a NoneType"),
            (torch.tensor(1.0), TypeError, "was given a Tensor"),
            ({"preds": torch.zeros(2, 1, 8, 8) > 0}, TypeError, "was given a dict of 'preds'"),
            (dict.fromkeys(["preds", "target"], torch.rand(2, 1, 8, 8)), TypeError, "compare probabilities with a"),
            (dict.fromkeys(["preds", "target"], torch.zeros(2, 8, 8) > 0), ValueError, r"given shapes \(2, 8, 8\)"),
            (dict.fromkeys(["preds", "target"], torch.zeros(3, 1, 8, 8) > 0), ValueError, "for 2 images"),
            (
                {"preds": torch.zeros(2, 2, 8, 8) > 0, "target": torch.zeros(2, 1, 8, 8) > 0},
                ValueError,
                r"shapes \(2, 2, 8, 8\) and \(2, 1, 8, 8\)",
            ),
        ],
    )
    def test_are_refused_at_the_first_batch(self, tmp_path: Path, outputs: Any, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            run(tmp_path, self.Returning(outputs), [torch.zeros(2, 3, 8, 8)])

    def test_masks_of_integers(self, tmp_path: Path):
        masks = torch.ones(2, 1, 8, 8, dtype=torch.uint8)
        run(tmp_path, self.Returning({"preds": masks, "target": masks}), [torch.zeros(2, 3, 8, 8)])
        assert column(read(tmp_path / "scores.csv"), "dice") == [1, 1]


def test_no_cases():
    masks = torch.zeros(0, 1, 8, 8, dtype=torch.bool)
    assert case_scores(masks, masks, Cases([], [], [], [], [])) == []


def test_keys_are_the_same_in_all_lines():
    preds, target = blobs(classes=2)
    rows = case_scores(preds, target, cases_of(torch.zeros(6, 3, 16, 20)), {"mine": torch.full((6, 2), torch.nan)})
    assert {tuple(row) for row in rows} == {(*CASE, "mine", *IN_PIXELS, *SIZES)}
    assert {row["mine"] for row in rows} == {None}


@pytest.mark.parametrize("name", ["ScoreWriter", "lightning_znorm.ScoreWriter"])
def test_by_name_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    write_lgg(tmp_path, patients=4, slices=2)
    config = {
        "model": {
            "class_path": "SegmentationTask",
            "init_args": {"model": "attention_unet", "model_kwargs": {"channels": [4, 8], "strides": [2]}},
        },
        "data": {
            "class_path": "LGGDataModule",
            "init_args": {"root": ".", "batch_size": 2, "val_fraction": 0.25, "test_fraction": 0.5},
        },
        "trainer": {
            "accelerator": "cpu",
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "own"}},
            "callbacks": [{"class_path": name}],
        },
    }
    Path("own.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match="uses the weights that the model starts with"):
        main(["test", "--config", "own.yaml"])
    assert len(read(tmp_path / "logs/own/version_0/scores.csv")) == 4
