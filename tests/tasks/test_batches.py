"""What loaders hand out, several of them too, and what networks return."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchvision.models import googlenet
from torchvision.models.inception import InceptionOutputs
from torchvision.models.segmentation import fcn_resnet50, lraspp_mobilenet_v3_large

from lightning_znorm import MaskOverlay, MaskWriter
from lightning_znorm.batches import cases_of
from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from lightning_znorm.tasks.base import Task
from tests.trainers import trainer

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASKS = (IMAGES[:, :1] > 0).float()
LABELS = torch.arange(5) % 4


def classifier(network: nn.Module | None = None, **kwargs: Any) -> ClassificationTask:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)) if network is None else network
    return ClassificationTask(network, num_classes=4, **kwargs)


def segmenter(network: nn.Module | None = None, **kwargs: Any) -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(nn.Conv2d(3, 1, 1) if network is None else network, **kwargs)


def loader_of(*tensors: Any, batch_size: int = 2) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


class TestSeveralLoaders:
    """Loaders of different sizes; in one of them no mask has a pixel, in prediction neither."""

    @staticmethod
    def loaders(targets: Tensor) -> list[DataLoader]:
        return [
            loader_of(IMAGES, targets),
            loader_of(IMAGES[:3], targets[1:4], batch_size=1),
            loader_of(IMAGES[2:], targets[2:].flip(0), batch_size=3),
        ]

    @pytest.mark.parametrize("stage", ["val", "test"])
    @pytest.mark.parametrize(("make", "targets"), [(classifier, LABELS), (segmenter, MASKS)])
    def test_each_has_the_scores_that_it_has_alone(self, make: Callable, targets: Tensor, stage: str):
        task, run = make(), trainer()
        evaluate = getattr(run, {"val": "validate", "test": "test"}[stage])
        for _ in range(2):  # nothing is left of the first time
            results = evaluate(task, self.loaders(targets), verbose=False)
            for number, (result, loader) in enumerate(zip(results, self.loaders(targets), strict=True)):
                (alone,) = evaluate(task, loader, verbose=False)
                assert result == {f"{name}/dataloader_idx_{number}": pytest.approx(alone[name]) for name in alone}
        scores = {name: value for result in results for name, value in result.items() if "loss" not in name}
        assert len(set(scores.values())) > len(scores) / 3  # they differ among loaders

    def test_an_accuracy_by_its_definition(self):
        task = classifier()
        results = trainer().test(task, self.loaders(LABELS), verbose=False)
        for number, loader in enumerate(self.loaders(LABELS)):
            images, labels = loader.dataset.tensors
            expected = (task(images).argmax(1) == labels).float().mean().item()
            assert results[number][f"test/accuracy/dataloader_idx_{number}"] == pytest.approx(expected)

    def test_in_training(self, tmp_path: Path):
        best = ModelCheckpoint(tmp_path, monitor="val/dice/dataloader_idx_1", mode="max")
        run = trainer(max_epochs=2, callbacks=[best], enable_checkpointing=True)
        task = segmenter()
        run.fit(task, loader_of(IMAGES, MASKS), self.loaders(MASKS))
        assert "val/dice" not in run.callback_metrics
        names = {f"val/{name}/dataloader_idx_{n}" for name in ("loss", "dice", "hausdorff") for n in range(3)}
        assert names <= run.callback_metrics.keys()
        alone = trainer().validate(task, self.loaders(MASKS)[1], verbose=False)[0]["val/dice"]
        assert run.callback_metrics["val/dice/dataloader_idx_1"].item() == pytest.approx(alone)
        assert not any("metric" in name for name in torch.load(best.best_model_path, weights_only=True)["state_dict"])

    @pytest.mark.filterwarnings("ignore:.* is NaN. all 3 masks are empty:UserWarning")
    def test_one_without_masks(self):
        class Marks(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return 20 * images[:, :1] - 10

        images = MASKS.expand(-1, 3, -1, -1)
        empty = loader_of(torch.zeros(3, 3, 8, 8), torch.zeros(3, 1, 8, 8))
        results = trainer().validate(segmenter(Marks()), [empty, loader_of(images, MASKS), empty], verbose=False)
        for number, result in enumerate(results):
            expected = 1.0 if number == 1 else float("nan")
            assert result[f"val/dice/dataloader_idx_{number}"] == pytest.approx(expected, nan_ok=True)

    def test_by_name(self):
        loaders = CombinedLoader(dict(zip("abc", self.loaders(LABELS), strict=True)), "sequential")
        results = trainer().validate(classifier(), loaders, verbose=False)
        assert [len(result) for result in results] == [2, 2, 2]

    def test_of_a_data_module(self):
        class Data(LightningDataModule):
            def test_dataloader(self) -> list[DataLoader]:
                return TestSeveralLoaders.loaders(LABELS)

        assert len(trainer().test(classifier(), datamodule=Data(), verbose=False)) == 3

    @pytest.mark.parametrize(("make", "targets"), [(classifier, LABELS), (segmenter, MASKS)])
    def test_predictions(self, make: Callable, targets: Tensor):
        task = make()
        predictions = trainer().predict(task, self.loaders(targets))
        for batches, loader in zip(predictions, self.loaders(targets), strict=True):
            torch.testing.assert_close(torch.cat(batches), task.predict_step(loader.dataset.tensors[0]))

    @pytest.mark.parametrize("is_put_off", [False, True])
    @pytest.mark.parametrize(("make", "targets", "what"), [(classifier, LABELS, "Labels"), (segmenter, MASKS, "Masks")])
    def test_a_wrong_target_is_found_in_each(
        self, make: Callable, targets: Tensor, what: str, is_put_off: bool, monkeypatch: pytest.MonkeyPatch
    ):
        if is_put_off:  # as on a GPU
            monkeypatch.setattr(Task, "defers_checks", lambda *_: True)
        loaders = [*self.loaders(targets)[:2], loader_of(IMAGES, targets * 9)]
        with pytest.raises(ValueError, match=f"{what} run from .* of test loader 2, and"):
            trainer().test(make(), loaders, verbose=False)

    def test_masks_and_overlays(self, tmp_path: Path):
        run = trainer(callbacks=[MaskOverlay(num_cases=2), MaskWriter(tmp_path / "written")], default_root_dir=tmp_path)
        run.test(segmenter(), self.loaders(MASKS), verbose=False)
        run.predict(segmenter(), self.loaders(MASKS), return_predictions=False)
        assert len(list((tmp_path / "written").glob("*_mask.png"))) == 5 + 3 + 3
        assert list(tmp_path.rglob("test.png"))


class WithIndex(Dataset):
    """Begins with images and targets, and goes on with whatever there is."""

    def __init__(self, targets: Tensor, *more: Callable[[int], Any]) -> None:
        self.targets, self.more = targets, more

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return IMAGES[index], self.targets[index], *(make(index) for make in self.more)


class TestBatches:
    @pytest.mark.parametrize(
        "more",
        [(int,), (lambda i: {"spacing": 0.5 * i},), (str, lambda i: torch.zeros(3))],
        ids=["index", "metadata", "both"],
    )
    @pytest.mark.parametrize(("make", "targets"), [(classifier, LABELS), (segmenter, MASKS)])
    def test_what_follows_is_left_aside(self, make: Callable, targets: Tensor, more: tuple, tmp_path: Path):
        pairs = DataLoader(WithIndex(targets), batch_size=2)
        longer = DataLoader(WithIndex(targets, *more), batch_size=2)
        found = []
        for loader in (pairs, longer):
            run, task = trainer(default_root_dir=tmp_path / str(len(found))), make()
            if make is segmenter:
                run.callbacks += [MaskOverlay(), MaskWriter(tmp_path / f"masks{len(found)}")]
            run.fit(task, loader, loader)
            found.append(
                {name: value.item() for name, value in run.callback_metrics.items()}
                | run.test(task, loader, verbose=False)[0]
                | {"predictions": torch.cat(run.predict(task, loader)).sum().item()}
            )
        assert found[0] == pytest.approx(found[1])
        if make is segmenter:
            written = [sorted(path.name for path in (tmp_path / f"masks{n}").iterdir()) for n in (0, 1)]
            assert written[0] == written[1]
            assert "000004_mask.png" in written[0]

    def test_a_list_and_a_named_tuple(self):
        Sample = namedtuple("Sample", "image mask name")
        for batch in ([IMAGES, MASKS, "x"], Sample(IMAGES, MASKS, "x")):
            (result,) = trainer().validate(segmenter(), DataLoader([batch], batch_size=None), verbose=False)
            assert result["val/dice"] > 0

    @pytest.mark.parametrize(
        ("batch", "what"),
        [
            ({"image": IMAGES, "masks": MASKS}, "a dict of 'image' and 'masks'"),
            ({"image": IMAGES, "label": "x"}, "a dict of 'image' and 'label'"),
            ({"image": [IMAGES], "label": MASKS}, "a dict of 'image' and 'label'"),
            (IMAGES, "a Tensor"),
            ([IMAGES], "a list of Tensor"),
            ((IMAGES, "x"), "a tuple of Tensor and str"),
            ([[IMAGES, MASKS], [IMAGES, MASKS]], "a list of list and list"),
            ([{"image": IMAGES}, MASKS], "a list of dict and Tensor"),
            ([], "an empty list"),
            (3, "an int"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize(("make", "targets"), [(classifier, "labels"), (segmenter, "masks")])
    def test_others_are_refused(self, make: Callable, targets: str, batch: Any, what: str):
        message = (
            f"^A batch is {what}, and a tuple or list that begins with images and {targets}, both tensors, "
            "or a dictionary with 'image' and 'label', is expected"
        )
        for step in ("training_step", "validation_step", "test_step"):
            with pytest.raises(TypeError, match=message):
                getattr(make(), step)(batch, 0)

    @pytest.mark.parametrize("make", [classifier, segmenter])
    def test_to_predict_for(self, make: Callable):
        task = make()
        expected = task.predict_step(IMAGES)
        for batch in ([IMAGES], (IMAGES, ["a", "b"]), (IMAGES, LABELS, {"spacing": 1}), {"image": IMAGES}):
            torch.testing.assert_close(task.predict_step(batch), expected)
        for batch, what in (({"images": IMAGES}, "a dict of 'images'"), ([], "an empty list"), ("x", "a str")):
            with pytest.raises(TypeError, match=f"^A batch is {what}, and images, a tensor, or a tuple or list"):
                task.predict_step(batch)


class TestDictionaries:
    """MONAI's batches, and what batches say about their cases."""

    @pytest.mark.parametrize("key", ["label", "mask"])
    @pytest.mark.parametrize(("make", "targets"), [(classifier, LABELS), (segmenter, MASKS)])
    def test_in_every_step(self, make: Callable, targets: Tensor, key: str):
        class Samples(Dataset):
            def __len__(self) -> int:
                return len(IMAGES)

            def __getitem__(self, index: int) -> dict[str, Any]:
                return {"image": IMAGES[index], key: targets[index], "name": f"{index}.png"}

        results = []
        for data in (DataLoader(Samples(), batch_size=2), loader_of(IMAGES, targets)):
            task, run = make(), trainer(max_epochs=1)
            run.fit(task, data, data)
            metrics = {name: value.item() for name, value in run.callback_metrics.items()}
            (tested,) = run.test(task, data, verbose=False)
            results.append((metrics, tested, torch.cat(run.predict(task, data))))
        assert results[0][:2] == results[1][:2]
        assert torch.equal(results[0][2], results[1][2])

    def test_of_monai(self, tmp_path: Path):
        """Its transforms and collation give tensors with metadata, and the steps work on plain ones."""
        import monai.data
        import monai.transforms as mt
        from PIL import Image

        paths = []
        for index in range(3):
            pair = {key: str(tmp_path / f"{key}{index}.png") for key in ("image", "label")}
            for path in pair.values():
                noise = np.random.default_rng(index).integers(0, 2, (8, 6), dtype=np.uint8)
                Image.fromarray(noise * 255).save(path)
            paths.append(pair)
        transform = mt.Compose(
            [
                mt.LoadImaged(["image", "label"]),
                mt.EnsureChannelFirstd(["image", "label"]),
                mt.ScaleIntensityd(["image", "label"]),
            ]
        )
        seen: list[type] = []

        class Network(nn.Conv2d):
            def forward(self, images: Tensor) -> Tensor:
                seen.append(type(images))
                return super().forward(images)

        task = segmenter(Network(1, 1, 1))
        data = monai.data.DataLoader(monai.data.Dataset(paths, transform), batch_size=3)
        run = trainer()
        run.fit(task, data, data)
        assert set(seen) == {Tensor}
        cases = cases_of(next(iter(data)))
        assert [Path(name).name for name in cases.name] == ["image0.png", "image1.png", "image2.png"]
        assert cases.spacing == [(1.0, 1.0)] * 3

    def test_what_is_said_of_cases(self):
        affine = np.diag([3.0, 0.5, 2.0, 1.0])[[1, 0, 2, 3]]
        said = {
            "name": ["a", "b"],
            "patient": torch.tensor([7, 8]),
            "slice": np.array([1.0, 2.0]),
            "affine": np.stack([affine, affine]),
        }
        volumes = torch.zeros(2, 1, 4, 5, 6)
        for batch in (
            (volumes, said),
            (volumes, volumes, said),
            {"image": volumes, **said},
            [volumes, ["x", "y"], said],
        ):
            cases = cases_of(batch)
            assert (cases.name, cases.patient, cases.slice) == (["a", "b"], ["7", "8"], ["1", "2"])
            assert cases.affine[0] == tuple(map(tuple, affine.tolist()))
            assert cases.spacing == [(3.0, 0.5, 2.0)] * 2
        own = cases_of((volumes, {**said, "spacing": torch.ones(2, 3)}))
        assert own.spacing == [(1.0, 1.0, 1.0)] * 2

    @pytest.mark.parametrize(
        "said",
        [
            {},
            {"name": ["a"]},
            {"name": "ab"},
            {"patient": [None, {}]},
            {"spacing": [1, 2]},
            {"affine": np.ones((2, 3, 3))},
        ],
    )
    def test_what_is_not_one_word_for_each_image(self, said: dict[str, Any]):
        cases = cases_of((torch.zeros(2, 1, 4, 5), said))
        lists = (cases.name, cases.patient, cases.slice, cases.affine, cases.spacing)
        assert set(map(tuple, lists)) == {(None, None)}

    @pytest.mark.parametrize("count", [2, 3, 4, 5])
    def test_numbers_that_torch_has_collated(self, count: int):
        """Its default_collate makes a list of one tensor for each axis of each image's tuple."""
        matrix = tuple(tuple(float(10 * row + column) for column in range(4)) for row in range(4))
        samples = [
            {"image": torch.zeros(1, 4, 5, 6), "spacing": (0.7, 0.8, 5.0 + index), "affine": matrix}
            for index in range(count)
        ]
        batch = default_collate(samples)
        if count in (3, 4):  # as many images as axes, or rows
            key = {3: "spacing", 4: "affine"}[count]
            with pytest.raises(
                ValueError, match=f"A batch of {count} images holds '{key}' as a list of {count} tensors"
            ):
                cases_of(batch)
            return
        cases = cases_of(batch)
        assert cases.spacing == [pytest.approx((0.7, 0.8, 5.0 + index)) for index in range(count)]
        assert cases.affine == [matrix] * count

    def test_single_tensors(self):
        said = {"slice": [torch.tensor(3), torch.tensor(4)], "affine": [torch.eye(4), 2 * torch.eye(4)]}
        cases = cases_of((torch.zeros(2, 1, 4, 5, 6), said))
        assert cases.slice == ["3", "4"]
        assert cases.spacing == [(1.0, 1.0, 1.0), (2.0, 2.0, 2.0)]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_numbers_that_lightning_has_rounded(self, dtype: torch.dtype):
        said = {"affine": torch.eye(4).expand(2, 4, 4).to(dtype)}
        with pytest.warns(UserWarning, match=r"A batch holds 'affine' in torch\.\w+, .* as a NumPy array"):
            cases = cases_of((torch.zeros(2, 1, 4, 5, 6), said))
        assert cases.affine == cases.spacing == [None, None]

    def test_a_single_path(self):
        assert cases_of((IMAGES[:1], {"name": Path("a.png")})).name == ["a.png"]


class Returns(nn.Module):
    """Puts what a network makes into something else."""

    def __init__(self, network: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.network(images))


class TestOutputs:
    """torchvision's and transformers', of which the logits are taken."""

    @pytest.mark.parametrize("aux_loss", [True, False])
    @pytest.mark.full
    def test_fcn(self, aux_loss: bool):
        network = fcn_resnet50(weights=None, weights_backbone=None, num_classes=1, aux_loss=aux_loss)
        task = segmenter(network)
        data = loader_of(torch.randn(4, 3, 32, 32), torch.randint(2, (4, 1, 32, 32)))
        run = trainer()
        run.fit(task, data, data)
        assert {"train/loss", "val/loss", "val/dice"} <= run.callback_metrics.keys()
        images = torch.randn(2, 3, 32, 32)
        task.eval()
        torch.testing.assert_close(task(images), network(images)["out"])
        assert all(p.grad is None for name, p in network.named_parameters() if name.startswith("aux"))

    @pytest.mark.full
    def test_lraspp_with_classes(self):
        network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
        task = segmenter(network, num_classes=3, activation="softmax")
        data = loader_of(torch.randn(4, 3, 32, 32), torch.randint(3, (4, 1, 32, 32)))
        run = trainer()
        run.fit(task, data, data)
        assert "val/dice" in run.callback_metrics

    @pytest.mark.full
    def test_auxiliary_logits_of_a_classifier(self):
        task = classifier(googlenet(weights=None, num_classes=4, init_weights=False, aux_logits=True))
        data = loader_of(torch.randn(4, 3, 32, 32), torch.arange(4))
        run = trainer()
        run.fit(task, data, data)
        assert {"train/loss", "val/accuracy"} <= run.callback_metrics.keys()

    def test_huggingface(self):
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], num_labels=4)
        network = ResNetForImageClassification(config)
        task = classifier(network)
        data = loader_of(torch.randn(4, 3, 32, 32), torch.arange(4))
        run = trainer()
        run.fit(task, data, data)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(task.eval()(images), network(images).logits)

    @pytest.mark.parametrize(
        "wrap",
        [lambda x: {"logits": x}, lambda x: OrderedDict(aux=-x, out=x), lambda x: InceptionOutputs(x, -x)],
        ids=["dict", "torchvision's dict", "named tuple"],
    )
    @pytest.mark.parametrize("make", [classifier, segmenter])
    def test_by_name(self, make: Callable, wrap: Callable):
        task, plain = make(), make()
        task.model = Returns(task.model, wrap)
        torch.testing.assert_close(task(IMAGES), plain(IMAGES))

    @pytest.mark.parametrize(
        ("wrap", "what"),
        [
            (lambda x: {"main": x, "aux": x}, "a dict of 'main' and 'aux'"),
            (lambda x: (x, None), "a tuple of Tensor and NoneType"),
            (lambda x: [], "an empty list"),
            (lambda x: None, "a NoneType"),
            (lambda x: {"out": [x]}, "a list of Tensor"),
        ],
    )
    def test_others_are_refused_by_a_classifier(self, wrap: Callable, what: str):
        task = classifier()
        task.model = Returns(task.model, wrap)
        with pytest.raises(
            ValueError, match=f"Returns turned 5 images into {what}, and the task takes logits, a tensor"
        ):
            task(IMAGES)

    @pytest.mark.parametrize(
        ("wrap", "what"),
        [
            (lambda x: {"main": x, "aux": x}, "a dict of 'main' and 'aux'"),
            (lambda x: (x, None), "a NoneType"),
            (lambda x: [], "an empty list"),
            (lambda x: torch.stack([x, x], dim=2), r"shape \(5, 1, 2, 8, 8\)"),
            (lambda x: [x[..., ::2, ::2]], r"shape \(5, 1, 4, 4\)"),
        ],
    )
    def test_others_are_refused_by_a_segmentation(self, wrap: Callable, what: str):
        task = segmenter()
        task.model = Returns(task.model, wrap)
        with pytest.raises(ValueError, match=f"Returns turned images of shape .* into {what}, and num_classes=1 asks"):
            task(IMAGES)
