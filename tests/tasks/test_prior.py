import copy
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from lightning_znorm.cli import main
from lightning_znorm.data import DigitsDataModule, ImageFolderDataModule, LGGDataModule, PCamDataModule
from lightning_znorm.errors import ZNormError, ZNormTypeError
from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from lightning_znorm.tasks.base import Task
from lightning_znorm.tasks.prior import checked_prior, find_output_biases
from tests.data.jpegs import write_image_folder
from tests.distributed import run_distributed
from tests.fsdp import FSDP1_GATHERS_STATE_ON_CPU
from tests.medical import write_lgg, write_pcam
from tests.tasks.ddp_prior import start
from tests.trainers import trainer

# The trainings here are cut short on purpose.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`Trainer.fit` stopped"),
    pytest.mark.filterwarnings(r"ignore:You .* a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MASKS = (IMAGES[:, :1] > 1).float()


def segmentation(network: Any = None, **kwargs: Any) -> SegmentationTask:
    torch.manual_seed(0)
    classes = kwargs.get("num_classes", 1)
    task = SegmentationTask(nn.Conv2d(3, classes, 3, padding=1) if network is None else network, **kwargs)
    return with_sgd(task)


def digits_task(network: nn.Module | None = None, **kwargs: Any) -> ClassificationTask:
    torch.manual_seed(0)
    network = network or nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(), nn.Linear(16, 10))
    return with_sgd(ClassificationTask(network, **{"num_classes": 10, **kwargs}))


def with_sgd(task: Any) -> Any:
    task.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    return task


def batches(images: Tensor = IMAGES, targets: Tensor = MASKS, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(images, targets), **{"batch_size": 4, **kwargs})


def begin(task: Task, data: Any = None, **kwargs: Any) -> Any:
    """Run what comes before the first step of a training, and no step."""
    run = trainer(max_epochs=0, num_sanity_val_steps=0)
    run.fit(task, **kwargs) if data is None else run.fit(task, data, **kwargs)
    return task


def in_fp64(shares: Sequence[float], softmax: bool) -> Tensor:
    values = np.log(np.array(shares, dtype=np.float64))
    return torch.from_numpy(values if softmax else values - np.log1p(-np.array(shares, dtype=np.float64)))


def changed(task: Task, before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in task.state_dict().items() if not torch.equal(tensor, before[name])]


def snapshot(task: Task) -> dict[str, Tensor]:
    return copy.deepcopy(task.state_dict())


SMALL_UNETPP = {"features": (4, 4, 4, 4, 4, 4)}
SMALL_ATTENTION = {"channels": (4, 8), "strides": (2,)}


@pytest.mark.parametrize(
    ("network", "kwargs", "size", "biases"),
    [
        ("resnet50_unet", {}, 32, ["segmentation_head.0.bias"]),
        ("unetpp", {"model_kwargs": SMALL_UNETPP}, 32, [f"final_conv_0_{depth}.bias" for depth in (1, 2, 3, 4)]),
        ("attention_unet", {"model_kwargs": SMALL_ATTENTION}, 32, ["model.2.conv.bias"]),
        (lambda: UNet(2, 3, 3, (4, 8, 16), (2, 2), num_res_units=2), {}, 16, ["model.2.1.conv.unit0.conv.bias"]),
        (lambda: UNet(2, 3, 3, (4, 8), (2,)), {}, 16, None),
    ],
)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_segmenters(
    network: str | Callable[[], nn.Module], kwargs: dict[str, Any], size: int, biases: list[str] | None, activation: str
):
    torch.manual_seed(0)
    shares = [0.9, 0.08, 0.02] if activation == "softmax" else [0.3, 0.05, 0.01]
    made = network if isinstance(network, str) else network()
    task = segmentation(made, num_classes=3, activation=activation, prior=shares, **kwargs)
    before = snapshot(task)
    data = batches(torch.randn(2, 3, size, size), torch.zeros(2, 3 if activation == "sigmoid" else 1, size, size))
    begin(task, data)
    # Other parameters and the statistics of batch normalization are the same, bit for bit.
    names = changed(task, before)
    assert biases is None or names == [f"model.{name}" for name in biases]
    expected = in_fp64(shares, activation == "softmax").float()
    for name in names:
        assert torch.equal(task.state_dict()[name], expected)
    assert all(module.training for module in task.modules())
    with torch.no_grad():
        means = task.eval().probabilities(task(torch.randn(2, 3, size, size))).mean((0, 2, 3))
    # What the last layer's input adds differs from network to network.
    assert all(share / 3 < mean < 3 * share for mean, share in zip(means.tolist(), shares, strict=True))


@pytest.mark.parametrize(
    ("name", "kwargs", "bias"),
    [
        ("resnet20", {}, "fc.bias"),
        ("resnet10t", {}, "fc.bias"),
        ("test_vit", {"img_size": 32}, "head.bias"),
    ],
)
@pytest.mark.parametrize(("prior", "classes"), [([0.9, 0.08, 0.02], 3), (0.05, 1), (0.05, 2)])
def test_classifiers(name: str, kwargs: dict[str, Any], bias: str, prior: Any, classes: int):
    task = digits_task(name, num_classes=classes, in_chans=3, prior=prior, model_kwargs=kwargs)
    before = snapshot(task)
    begin(task, batches(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)))
    assert changed(task, before) == [f"model.{bias}"]
    shares = prior if classes == 3 else [prior] if classes == 1 else [1 - prior, prior]
    assert torch.equal(task.state_dict()[f"model.{bias}"], in_fp64(shares, classes > 1).float())


@pytest.mark.parametrize("share", [1e-9, 1e-3, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value(share: float, dtype: torch.dtype):
    task = begin(segmentation(prior=share).to(dtype), batches())
    assert task.model.bias.item() == torch.tensor(math.log(share / (1 - share)), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        task.model.weight.zero_()
    probabilities = task.predict_step(IMAGES.to(dtype))
    assert probabilities.mean().item() == pytest.approx(share, rel=0.2 if dtype == torch.bfloat16 else 1e-4)


class Net(nn.Module):
    """One of several ways to end."""

    def __init__(self, end: str, classes: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, classes, 3, padding=1)  # its bias has the length of an output's
        self.norm = nn.BatchNorm2d(classes)
        self.last = nn.Conv2d(classes, classes, 1, bias=end not in ("no bias", "shape"))
        self.aux = nn.Conv2d(classes, classes, 1, bias=end != "aux without")
        self.affine_free = nn.BatchNorm2d(classes, affine=False)
        self.bias = nn.Parameter(torch.zeros(1, classes, 1, 1)) if end == "shape" else None
        self.dropout = nn.Dropout()
        self.end = end

    def forward(self, images: Tensor) -> Any:
        x = self.norm(self.first(images)).relu()
        logits = self.last(self.dropout(x))
        match self.end:
            case "norm":
                return self.affine_free(logits)
            case "sigmoid":
                return logits.sigmoid()
            case "halved":
                return logits / 2
            case "shape":
                return logits + self.bias
            case "upsampled":
                half = nn.functional.avg_pool2d(logits, 2)
                return nn.functional.interpolate(half, scale_factor=2, mode="bilinear")
            case "aux" | "aux without":
                return [self.aux(x), logits]
            case "same twice":
                return [logits, logits]
            case "dict":
                return {"out": logits, "aux": self.aux(x)}
        return logits


@pytest.mark.parametrize(
    ("end", "names"),
    [
        ("plain", ["last.bias"]),
        ("upsampled", ["last.bias"]),
        ("shape", ["bias"]),
        ("aux", ["aux.bias", "last.bias"]),
        ("same twice", ["last.bias"]),
        ("dict", ["last.bias"]),
    ],
)
def test_which_bias(end: str, names: list[str]):
    task = segmentation(Net(end), num_classes=2, prior=[0.3, 0.01])
    before = snapshot(task)
    begin(task, batches(targets=MASKS.expand(-1, 2, -1, -1)))
    assert sorted(changed(task, before)) == [f"model.{name}" for name in names]
    for name in names:
        bias = task.model.get_parameter(name)
        assert torch.equal(bias.flatten(), in_fp64([0.3, 0.01], softmax=False).float())


@pytest.mark.parametrize("end", ["no bias", "norm", "sigmoid", "halved", "aux without"])
def test_no_bias(end: str):
    """The network is as it was."""
    task = segmentation(Net(end), num_classes=2, prior=0.01)
    task.model.norm.eval()
    before = snapshot(task)
    outputs = r" \(for 1 of its 2 outputs\)" if end == "aux without" else ""
    with pytest.raises(
        ZNormError,
        match=rf"^prior .* Net has no parameter called `bias` of 2 elements .*{outputs}: give its last layer",
    ):
        begin(task, batches(targets=MASKS.expand(-1, 2, -1, -1)))
    assert changed(task, before) == []
    assert task.training
    assert [module for module in task.modules() if not module.training] == [task.model.norm]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.LazyConv2d(1, 1), r"layers of Conv2d have no weights yet|layers of LazyConv2d have no weights yet"),
        (nn.Sequential(nn.Conv2d(3, 1, 1, bias=False)), "Sequential has no parameter called `bias` of 1 element that"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_networks_without_weights_or_bias(network: nn.Module, said: str):
    with pytest.raises(ZNormError, match=said):
        begin(segmentation(network, prior=0.01), batches())


def test_an_error_of_the_network_restores_it():
    class Fails(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            if self.bias.item() > 0.9:
                raise KeyError("raised")
            return super().forward(images)

    task = segmentation(Fails(3, 1, 1), prior=0.01)
    nn.init.zeros_(task.model.bias)
    before = snapshot(task)
    with pytest.raises(KeyError, match="raised"):
        begin(task, batches())
    assert changed(task, before) == []
    assert task.model.training


TYPES = "prior must be a share, a list of one for each class, or 'auto', got "


@pytest.mark.parametrize(
    ("prior", "classes", "softmax", "said"),
    [
        (True, 1, False, f"{TYPES}True"),
        ([0.5, True], 2, False, TYPES),
        ("0.01", 1, False, f"{TYPES}'0.01'"),
        ("Auto", 1, False, f"{TYPES}'Auto'"),
        ({"a": 0.1}, 1, False, TYPES),
        ([[0.5]], 1, False, TYPES),
        ([None], 1, False, TYPES),
        (torch.tensor([[0.2, 0.8]]), 2, True, TYPES),
        (math.nan, 1, False, r"in \(0, 1\), got nan"),
        ([0.5, math.nan], 2, True, r"in \(0, 1\), got \[0.5, nan\]"),
        (0, 1, False, r"in \(0, 1\), got 0\."),
        (1.0, 1, False, r"in \(0, 1\), got 1\.0"),
        (-0.1, 1, False, r"in \(0, 1\), got -0\.1"),
        ([0.0, 1.0], 2, True, r"in \(0, 1\), got"),
        ([], 1, False, r"prior holds 0 shares, and num_classes=1 asks for 1: \[\]"),
        ([0.9, 0.1], 1, False, "prior holds 2 shares, and num_classes=1 asks for 1"),
        ([0.9], 2, True, "prior holds 1 share, and num_classes=2 asks for 2"),
        (0.1, 3, True, "prior must be a list of the shares of all 3 classes, got 0.1"),
        ([0.2, 0.2, 0.2], 3, True, "they add up to 0.6, not 1"),
        ([0.9, 0.9], 2, True, "they add up to 1.8, not 1"),
    ],
)
def test_refused(prior: Any, classes: int, softmax: bool, said: str):
    with pytest.raises(ZNormError, match=said) as raised:
        checked_prior(prior, classes, softmax)
    assert isinstance(raised.value, TypeError) == (said.startswith(TYPES))


@pytest.mark.parametrize(
    ("prior", "classes", "softmax", "shares"),
    [
        (None, 3, True, None),
        ("auto", 3, True, "auto"),
        (0.25, 1, False, [0.25]),
        (0.25, 2, False, [0.25, 0.25]),
        (0.25, 2, True, [0.75, 0.25]),
        ([0.9, 0.3], 2, False, [0.9, 0.3]),
        ((0.9, 0.1), 2, True, [0.9, 0.1]),
        (np.array([0.75, 0.25]), 2, True, [0.75, 0.25]),
        (np.float64(0.25), 1, False, [0.25]),
        (torch.tensor(0.25), 1, False, [0.25]),
        ([0.33, 0.33, 0.33], 3, True, [0.33, 0.33, 0.33]),  # rounded
    ],
)
def test_accepted(prior: Any, classes: int, softmax: bool, shares: Any):
    assert checked_prior(prior, classes, softmax) == shares


def test_the_tasks_check_it_at_once():
    with pytest.raises(ZNormError, match=r"they add up to 0\.2, not 1"):
        ClassificationTask(nn.Linear(1, 2), num_classes=2, prior=[0.1, 0.1])
    with pytest.raises(ZNormError, match="num_classes=1 asks for 1"):
        SegmentationTask(nn.Linear(1, 2), prior=[0.1, 0.1])
    # Two sigmoids need not add up, and one share stands for both.
    SegmentationTask(nn.Linear(1, 2), num_classes=2, prior=[0.1, 0.1])
    SegmentationTask(nn.Linear(1, 2), num_classes=2, prior=0.1)


class Pooled(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(3, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images.mean((2, 3)))


class Counted(LightningDataModule):
    """Gives the given shares, whatever is in it."""

    def __init__(self, *shares: Any) -> None:
        super().__init__()
        self.shares = shares

    def class_frequencies(self) -> Any:
        return self.shares

    def train_dataloader(self) -> DataLoader:
        return batches()


class Uncounted(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return batches()


class TestAuto:
    def test_digits(self):
        data = DigitsDataModule(val_fraction=0.2)
        task = begin(digits_task(prior="auto"), data)
        counts = np.bincount(data.train_set.labels)
        assert counts.sum() == len(data.train_set)
        assert torch.equal(task.model[3].bias.detach(), in_fp64(counts / counts.sum(), softmax=True).float())

    @pytest.mark.parametrize("softmax", [False, True])
    def test_lgg(self, tmp_path: Path, softmax: bool):
        written = write_lgg(tmp_path)
        data = LGGDataModule(tmp_path, batch_size=2, val_fraction=0.3, test_fraction=0.3, augment=True)
        kwargs = {"num_classes": 2, "activation": "softmax"} if softmax else {}
        task = begin(segmentation(prior="auto", **kwargs), data)
        masks = [mask for name, (_, mask) in written.items() if name[:12] in data.patients["train"]]
        assert len(masks) == len(data.train_set) < len(written)
        share = np.mean([mask == 255 for mask in masks], dtype=np.float64)
        shares = [1 - share, share] if softmax else [share]
        torch.testing.assert_close(task.model.bias.detach().double(), in_fp64(shares, softmax), rtol=1e-6, atol=0)

    @pytest.mark.parametrize(
        ("given", "kwargs", "shares"),
        [
            ([0.9, 0.1], {}, [0.1]),  # one logit stands for the second of two classes
            (torch.tensor([0.25]), {}, [0.25]),
            (np.array([0.25, 0.5]), {"num_classes": 2}, [0.25, 0.5]),
            ([0.25, 0.75], {"num_classes": 2, "activation": "softmax"}, [0.25, 0.75]),
            ([0.25], {"num_classes": 2, "activation": "softmax"}, [0.75, 0.25]),
        ],
    )
    def test_shares(self, given: Any, kwargs: dict[str, Any], shares: list[float]):
        task = begin(segmentation(prior="auto", **kwargs), Counted(*given))
        assert torch.equal(task.model.bias.detach(), in_fp64(shares, "activation" in kwargs).float())

    @pytest.mark.parametrize(
        ("data", "kwargs", "said"),
        [
            (batches(), {}, "there is no data module: give the shares yourself"),
            (Uncounted(), {}, r"Uncounted has no class_frequencies\(\): give the shares yourself"),
            (Counted(0.0), {}, "the class makes 0% of Counted's training set"),
            (Counted(0.0, 1.0), {}, "the class makes 100% of Counted's training set"),
            (Counted(1.0, 0.0), {"num_classes": 2, "activation": "softmax"}, "class 0 makes 100% of Counted's"),
            (Counted(0.3, 0.0), {"num_classes": 2}, "class 1 makes 0% of Counted's"),
            (Counted(0.3), {"num_classes": 2}, "Counted counts 1 class, and the task was given num_classes=2"),
            (Counted(0.2, 0.3, 0.5), {}, "Counted counts 3 classes, and the task was given num_classes=1"),
            (Counted(90, 10), {"num_classes": 2}, r"Counted returned \[90, 10\], and shares between 0 and 1 are"),
            (Counted(math.nan), {}, r"Counted returned \[nan\], and shares between 0 and 1 are"),
            (Counted(0.2, 0.2), {"num_classes": 2, "activation": "softmax"}, "between 0 and 1 that add up to 1 are"),
        ],
    )
    def test_refused(self, data: Any, kwargs: dict[str, Any], said: str):
        with pytest.raises(ZNormError, match=said):
            begin(segmentation(prior="auto", **kwargs), data)

    def test_image_folder(self, tmp_path: Path):
        """Classes of 8, 5 and 3 images."""
        root = write_image_folder(tmp_path / "images", classes=3, train=8, val=1)
        for label, count in ((1, 5), (2, 3)):
            for path in sorted((root / f"train/n{label:08}").iterdir())[count:]:
                path.unlink()
        data = ImageFolderDataModule(root, batch_size=4, num_workers=0, image_size=16, resize_size=18, val_fraction=0.2)
        task = begin(digits_task(Pooled(3), num_classes=3, prior="auto"), data)
        folders = [Path(os.fsdecode(path)).parent.name for path in data.train_set.paths]
        counts = [folders.count(f"n{label:08}") for label in range(3)]
        assert counts[0] > counts[1] > counts[2] > 0
        assert torch.equal(task.model.last.bias.detach(), in_fp64(np.array(counts) / sum(counts), softmax=True).float())

    @pytest.mark.parametrize("classes", [1, 2])
    def test_pcam(self, tmp_path: Path, classes: int):
        """Its 41 training images are of the classes 0, 1, 0 and so on; the last is of class 0."""
        pytest.importorskip("h5py")
        write_pcam(tmp_path, counts=(41, 4, 4))
        data = PCamDataModule(tmp_path, batch_size=4, cache_dir=tmp_path / "cache")
        task = begin(digits_task(Pooled(classes), num_classes=classes, prior="auto"), data)
        expected = in_fp64([20 / 41] if classes == 1 else [21 / 41, 20 / 41], softmax=classes == 2)
        assert torch.equal(task.model.last.bias.detach(), expected.float())

    def test_a_training_set_without_labels(self):
        data = DigitsDataModule()
        data.train_set = TensorDataset(IMAGES)
        with pytest.raises(ZNormError, match=r"^DigitsDataModule cannot count .* TensorDataset, has no labels: define"):
            data.class_frequencies()

    def test_not_the_data_module_of_an_earlier_training(self):
        run = trainer(max_epochs=0)
        run.fit(segmentation(), datamodule=Counted(0.25))
        with pytest.raises(ZNormError, match="there is no data module"):
            run.fit(segmentation(prior="auto"), batches())


class Stream(IterableDataset):
    """Images without a length, one at a time or in batches."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        yield from zip(*(part.split(self.size) if self.size else part for part in (IMAGES, MASKS)), strict=True)


class Batches(Dataset):
    """Makes a batch of several indices, or has batches in place of images."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    def __len__(self) -> int:
        return len(IMAGES) // (self.size or 1)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        rows = slice(index * self.size, (index + 1) * self.size) if self.size else index
        return IMAGES[rows], MASKS[rows]


class Watched(nn.Conv2d):
    """Keeps the shapes of its images."""

    def __init__(self) -> None:
        super().__init__(3, 1, 1)
        self.shapes: set[tuple[int, ...]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.add(tuple(images.shape))
        return super().forward(images)


def many_at_once() -> DataLoader:
    return DataLoader(Batches(), batch_size=None, sampler=BatchSampler(RandomSampler(range(8)), 4, drop_last=False))


class TestLoaders:
    @pytest.mark.parametrize(
        "loader",
        [
            batches(shuffle=True),
            batches(IMAGES[:1], MASKS[:1], batch_size=1),
            batches(batch_size=1, batch_sampler=BatchSampler(RandomSampler(range(8)), 3, drop_last=False)),
            DataLoader(Stream(), batch_size=4),
            DataLoader(Stream(size=4), batch_size=None),
            DataLoader(Batches(size=4), batch_size=None, shuffle=True),
            many_at_once(),
            DataLoader(Batches(), batch_size=4, num_workers=1),
        ],
        ids=["map", "one image", "batch sampler", "stream", "stream of batches", "batches", "many at once", "workers"],
    )
    def test_passed_to_fit(self, loader: DataLoader):
        task = begin(segmentation(Watched(), prior=0.01), loader)
        assert {shape[1:] for shape in task.model.shapes} == {(3, 16, 16)}
        assert task.model.bias.item() == pytest.approx(math.log(0.01 / 0.99), rel=1e-6)

    @pytest.mark.parametrize(
        ("loader", "kind"),
        [
            ([(IMAGES, MASKS)], "a list"),
            ({"a": batches()}, "a dict"),
            (CombinedLoader([batches()], "sequential"), "CombinedLoader"),
        ],
    )
    def test_of_another_kind(self, loader: Any, kind: str):
        said = rf"the training's loader, {kind}, does not tell it: set example_input_array of the task"
        task = segmentation(prior=0.01)
        with pytest.raises(ZNormError, match=said):
            begin(task, loader)
        task.example_input_array = IMAGES[:1]
        begin(task, loader)
        assert task.model.bias.item() == pytest.approx(math.log(0.01 / 0.99), rel=1e-6)

    def test_empty(self):
        class Nothing(Stream):
            def __iter__(self) -> Iterator[Sequence[Tensor]]:
                yield from ()

        with pytest.raises(ZNormError, match=r"the training set, Nothing, is empty"):
            begin(segmentation(prior=0.01), DataLoader(Nothing(), batch_size=2))

    def test_no_images(self):
        data = DataLoader([{"images": IMAGES[0]}] * 2, batch_size=2)
        with pytest.raises(ZNormError, match="A batch is a dict of 'images', and images"):
            begin(segmentation(prior=0.01), data)

    @pytest.mark.parametrize("by", ["module", "data module"])
    def test_hooks_that_change_batches(self, by: str):
        """Lightning calls the data module's if it has one, else the module's."""

        class Cuts:
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                images, masks = batch
                return images[..., :8, :8], masks[..., :8, :8]

        class Module(Cuts, SegmentationTask):
            pass

        class Data(Cuts, Uncounted):
            pass

        kind, data = (Module, Uncounted()) if by == "module" else (SegmentationTask, Data())
        task = begin(kind(Watched(), prior=0.01), data)
        assert {shape[2:] for shape in task.model.shapes} == {(8, 8)}

    def test_of_the_task_itself(self):
        class WithData(SegmentationTask):
            def train_dataloader(self) -> DataLoader:
                return batches()

        task = begin(WithData(nn.Conv2d(3, 1, 1), prior=0.01))
        assert task.model.bias.item() == pytest.approx(math.log(0.01 / 0.99), rel=1e-6)


class AugmentedDigits(DigitsDataModule):
    """Draws from all three generators for each batch."""

    def augment_batch(self, images: Tensor) -> Tensor:
        noise = int(torch.randint(2, ())) + np.random.randint(2) + random.randrange(2)
        return images.roll(noise, dims=-1)


class Records(Callback):
    """Keeps the initial weights, the random states when a training begins, and the batches."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def on_fit_start(self, trainer: Any, task: Any) -> None:
        self.states = self.states_now()
        self.weights = snapshot(task)

    @staticmethod
    def states_now() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0])

    def on_train_end(self, trainer: Any, task: Any) -> None:
        self.last_states = self.states_now()


class DrawsBeforeTheOrder(Callback):
    """Draws between ``setup`` and the moment in which Lightning asks for the loader."""

    def on_fit_start(self, *_: Any) -> None:
        torch.rand(3)


class TestRandomNumbers:
    @pytest.mark.parametrize("data", ["module", "loader", "generator"])
    def test_none_is_drawn(self, data: str):
        runs = []
        for prior in (None, [0.1] * 10):
            records = Records()
            torch.manual_seed(0)
            network = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 10)
            )
            task = digits_task(network, prior=prior)
            torch.manual_seed(1)
            random.seed(1)
            np.random.seed(1)
            made: Any = AugmentedDigits(batch_size=256)
            if data != "module":
                made.setup("fit")
                order = torch.Generator().manual_seed(3) if data == "generator" else None
                images, labels = torch.from_numpy(made.train_set.images).float(), made.train_set.labels
                made = batches(images, torch.from_numpy(labels), batch_size=256, shuffle=True, generator=order)
            callbacks = [records, DrawsBeforeTheOrder()]
            trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks).fit(task, made)
            runs.append(records)
        without, with_prior = runs
        assert without.states == with_prior.states
        assert without.last_states == with_prior.last_states
        assert len(without.batches) == len(with_prior.batches) >= 10
        assert all(map(torch.equal, without.batches, with_prior.batches))
        differ = {name for name, each in without.weights.items() if not torch.equal(each, with_prior.weights[name])}
        assert differ == {"model.4.bias"}


def test_the_probing_is_not_compiled(monkeypatch: pytest.MonkeyPatch):
    compiled: list[str] = []
    masks = MASKS.expand(-1, 2, -1, -1)
    compile_module = nn.Module.compile

    def backend(graph: Any, _: Any) -> Any:
        compiled.append("compiled")
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    task = segmentation(Net("plain"), num_classes=2, compile=True, prior=0.01)
    begin(task, batches(targets=masks))
    assert compiled == []
    assert task.model.last.bias[0].item() == pytest.approx(math.log(0.01 / 0.99), rel=1e-6)
    trainer(max_steps=1).fit(task, batches(targets=masks))
    assert compiled == ["compiled"]


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("end", "sentence"),
        [
            ("plain", "prior: model.last.bias starts at log(p / (1 - p)) with p = 0.3, 0.01."),
            ("aux", "prior: model.last.bias, model.aux.bias start at log(p / (1 - p)) with p = 0.3, 0.01."),
        ],
    )
    def test_once_when_training_starts(self, end: str, sentence: str, caplog: pytest.LogCaptureFixture):
        task = segmentation(Net(end), num_classes=2, prior=[0.3, 0.01])
        for _ in range(2):
            with caplog.at_level(logging.INFO):
                trainer(max_steps=1).fit(task, batches(targets=MASKS.expand(-1, 2, -1, -1)))
        assert caplog.text.count(sentence) == 1

    @pytest.mark.filterwarnings("ignore:.*ckpt_path")
    def test_nothing_if_a_checkpoint_brings_the_bias(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        _, path = TestWeightsThatAreThere.trained(tmp_path)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer(max_epochs=2).fit(segmentation(prior=0.5), batches(), ckpt_path=path)
        assert "prior:" not in caplog.text


class TestWeightsThatAreThere:
    """A training that goes on keeps what was learned."""

    @staticmethod
    def trained(folder: Path, **kwargs: Any) -> tuple[SegmentationTask, Path]:
        task = segmentation(prior=0.01, **kwargs)
        saves = ModelCheckpoint(folder, filename="it")
        trainer(enable_checkpointing=True, callbacks=[saves]).fit(task, batches())
        assert abs(task.model.bias.item() - math.log(0.01 / 0.99)) > 1e-3
        return task, folder / "it.ckpt"

    def test_a_second_fit(self, tmp_path: Path):
        task, _ = self.trained(tmp_path)
        before = snapshot(task)
        assert changed(begin(task, batches()), before) == []

    def test_load_from_checkpoint(self, tmp_path: Path):
        task, path = self.trained(tmp_path)
        loaded = SegmentationTask.load_from_checkpoint(path, model=nn.Conv2d(3, 1, 3, padding=1))
        assert loaded.hparams.prior == 0.01
        assert changed(begin(loaded, batches()), snapshot(task)) == []

    def test_load_state_dict(self, tmp_path: Path):
        task, path = self.trained(tmp_path)
        fresh = segmentation(prior=0.5)
        fresh.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert changed(begin(fresh, batches()), snapshot(task)) == []

    def test_weights_without_the_output_layer(self):
        """A backbone that was trained elsewhere."""
        task = segmentation(Net("plain"), num_classes=2, prior=0.25)
        backbone = {name: tensor + 1 for name, tensor in snapshot(task).items() if "last" not in name}
        task.load_state_dict(backbone, strict=False)
        before = snapshot(task)
        assert changed(begin(task, batches(targets=MASKS.expand(-1, 2, -1, -1))), before) == ["model.last.bias"]

    def test_task_that_was_pickled_before_there_was_a_prior(self):
        task = segmentation()
        for name in ("_prior", "_num_logits", "_uses_softmax"):
            vars(task).pop(name)
        before = snapshot(task)
        assert changed(begin(task, batches()), before) == []

    @pytest.mark.filterwarnings("ignore:.*ckpt_path")
    def test_resumed(self, tmp_path: Path):
        """A new task that the same Trainer then trains begins with its prior."""
        task, path = self.trained(tmp_path)
        resumed, run = segmentation(prior=0.5), trainer()
        run.fit(resumed, batches(), ckpt_path=path)
        assert changed(resumed, snapshot(task)) == []
        new = segmentation(prior=0.25)
        run.fit(new, batches())
        assert new.model.bias.item() == pytest.approx(math.log(1 / 3), rel=1e-6)

    def test_an_evaluation_before_it_sets_nothing(self):
        task = segmentation(prior=0.01)
        before = snapshot(task)
        trainer().validate(task, batches(), verbose=False)
        assert changed(task, before) == []
        assert changed(begin(task, batches()), before) == ["model.bias"]

    def test_a_setup_that_failed_is_made_up_for(self):
        task = segmentation(prior="auto")
        with pytest.raises(ZNormError, match="no data module"):
            begin(task, batches())
        begin(task, Counted(0.25))
        assert task.model.bias.item() == pytest.approx(math.log(1 / 3), rel=1e-6)

    @pytest.mark.parametrize("prior", [None, "auto", 0.01, [0.01], np.float32(0.25)])
    def test_hyperparameter(self, tmp_path: Path, prior: Any):
        task = begin(segmentation(prior=prior), Counted(0.25))
        task.trainer.save_checkpoint(tmp_path / "it.ckpt")
        checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"]["prior"] == prior
        assert type(checkpoint["hyper_parameters"]["prior"]) in (type(None), str, float, list)

    def test_without_a_prior_nothing_is_set(self):
        task = segmentation()
        before = snapshot(task)
        assert changed(begin(task, [(IMAGES, MASKS)]), before) == []  # nor is the loader looked at


@pytest.mark.parametrize(
    "strategy",
    ["ddp", pytest.param("fsdp", marks=pytest.mark.skipif(not FSDP1_GATHERS_STATE_ON_CPU, reason="crashes torch 2.6"))],
)
def test_two_processes(strategy: str):
    """Their own initial weights differ."""
    (first, shares, drew), (other, _, other_drew) = run_distributed(start, strategy)
    torch.testing.assert_close(torch.tensor(first), in_fp64(shares, softmax=True).float(), rtol=1e-6, atol=0)
    assert other == first
    assert not drew
    assert not other_drew


@pytest.mark.parametrize(
    ("flag", "prior", "shares"),
    [("auto", "auto", None), ("0.01", 0.01, [0.01]), ("[0.2,0.8]", [0.2, 0.8], [0.2, 0.8]), ("null", None, None)],
)
def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_lgg: Path, flag: str, prior: Any, shares: list[float] | None
):
    monkeypatch.chdir(tmp_path)
    softmax = shares == [0.2, 0.8]
    network = {"model": "attention_unet", "model_kwargs": {"channels": [4, 8], "strides": [2]}}
    classes = {"activation": "softmax", "num_classes": 2} if softmax else {}
    sets = {"root": str(fake_lgg), "batch_size": 4, "val_fraction": 0.3, "test_fraction": 0.3}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    (tmp_path / "it.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "SegmentationTask", "init_args": {**network, **classes}},
                "data": {"class_path": "LGGDataModule", "init_args": sets},
                "trainer": {"max_steps": 1, "accelerator": "cpu", "log_every_n_steps": 1, **quiet},
            }
        )
    )
    seen: list[Any] = []
    setup = Task.setup

    def watched(self: Task, stage: str) -> None:
        before = snapshot(self)
        setup(self, stage)
        bias = self.get_parameter("model.model.2.conv.bias").detach().clone()
        seen.append((self.hparams.prior, bias, changed(self, before), self.trainer.datamodule.class_frequencies()))

    monkeypatch.setattr(Task, "setup", watched)
    main(["fit", "--config", "it.yaml", "--model.init_args.prior", flag])
    ((given, bias, names, counted),) = seen
    assert given == prior
    assert names == ([] if prior is None else ["model.model.2.conv.bias"])
    if prior is not None:
        assert torch.equal(bias, in_fp64(shares or counted, softmax).float())


def test_loader_that_fails_leaves_the_data_module_as_it_was():
    class Failing(Counted):
        def train_dataloader(self) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            raise KeyError("as it happens")

    data = Failing(0.25)
    with pytest.raises(KeyError, match="as it happens"):
        begin(segmentation(prior=0.25), data)
    assert not hasattr(data, "calls")


@pytest.mark.parametrize("data", [DigitsDataModule(), LGGDataModule()], ids=lambda data: type(data).__name__)
def test_counting_before_setup(data: Any):
    with pytest.raises(RuntimeError, match=r'DataModule has no training set yet: call its setup\("fit"\) first'):
        data.class_frequencies()


@pytest.mark.parametrize(
    ("frequencies", "shown"),
    [
        ([0.2], "\\[0.2\\]"),  # an attribute in place of a method
        (lambda: 0.2, "0.2"),
        (lambda: None, "None"),
        (lambda: {0: 0.8, 1: 0.2}, "\\{0: 0.8, 1: 0.2\\}"),
        (lambda: ["many"], "\\['many'\\]"),
        (lambda: [], "\\[\\]"),
    ],
)
def test_frequencies_that_are_no_list_of_numbers(frequencies: Any, shown: str):
    data = Uncounted()
    data.class_frequencies = frequencies
    message = f"^prior='auto' asks the method Uncounted.class_frequencies for a list .* and got {shown}.$"
    with pytest.raises(ZNormTypeError, match=message):
        begin(segmentation(prior="auto"), data)


def test_counts_are_shown_as_they_were_returned():
    with pytest.raises(ZNormError, match=r"class_frequencies\(\) of Counted returned \[58, 6\], and shares between"):
        begin(segmentation(prior="auto"), Counted(58, 6))


def test_layers_on_the_meta_device():
    with torch.device("meta"):
        network = nn.Conv2d(3, 1, 1)
    with pytest.raises(ZNormError, match="layers of Conv2d have no weights yet"):
        find_output_biases(network, lambda images: [network(images)], (2, 3, 4, 4), num_classes=1)


def test_tensor_of_shares(tmp_path: Path):
    shares = torch.tensor([0.25, 0.5])
    task = begin(segmentation(Net("plain"), num_classes=2, prior=shares), batches(targets=MASKS.expand(-1, 2, -1, -1)))
    assert torch.equal(task.model.last.bias, in_fp64([0.25, 0.5], softmax=False).float())
    assert task.hparams.prior == [0.25, 0.5]
