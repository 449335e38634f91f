"""Hyperparameters that are NumPy values: checkpoints hold plain values, and can be loaded again."""

import enum
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm import data as data_modules
from lightning_znorm import tasks
from lightning_znorm.data import CIFAR10DataModule, DigitsDataModule, LGGDataModule, PCamDataModule
from lightning_znorm.hyperparameters import not_loadable, plain_value, plain_values, python_scalars
from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from tests.data.jpegs import write_image_folder
from tests.medical import write_mask_folder, write_volumes
from tests.trainers import trainer

# Arguments that may be objects are no hyperparameters.
OBJECTS = {"model", "loss", "optimizer", "lr_scheduler", "metrics", "inferer"}
TASKS: dict[str, dict[str, Any]] = {
    "ClassificationTask": {
        "num_classes": 10,
        "in_chans": 1,
        "model_kwargs": None,
        "lr_scheduler_interval": "step",
        "compile": False,
        "lr_scheduler_frequency": 2,
        "lr_scheduler_strict": False,
        "prior": [0.25, *[0.125] * 5, *[0.03125] * 4],
        "channels_last": True,
    },
    "SegmentationTask": {
        "num_classes": 2,
        "in_chans": 1,
        "spatial_dims": 2,
        "model_kwargs": {"channels": [4, 8], "strides": [2], "dropout": 0.25},
        "activation": "softmax",
        "threshold": 0.25,
        "lr_scheduler_interval": "step",
        "compile": False,
        "lr_scheduler_frequency": 2,
        "lr_scheduler_strict": False,
        "prior": [0.75, 0.25],
        "channels_last": True,
        "class_names": ["tumour"],
        "ignore_index": 255,
        "size_divisor": 2,
    },
}
MODELS = {"ClassificationTask": "resnet20", "SegmentationTask": "attention_unet"}
DATA: dict[str, dict[str, Any]] = {
    "CIFAR10DataModule": {"batch_size": 50, "val_fraction": 0.25, "seed": 3, "augment": True, "download": False},
    "DigitsDataModule": {"batch_size": 400, "val_fraction": 0.25, "seed": 3},
    "ImageFolderDataModule": {
        "batch_size": 2,
        "num_workers": 0,
        "image_size": 32,
        "resize_size": 36,
        "val_fraction": 0.25,
        "seed": 3,
    },
    "LGGDataModule": {
        "batch_size": 4,
        "val_fraction": 0.25,
        "test_fraction": 0.25,
        "seed": 3,
        "augment": True,
        "predict_root": "images",
        "max_memory_gb": 0.5,
        "cache_dir": "cache",
        "image_size": 32,
        "train_transform": {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 0.25}},
        "num_workers": 0,
    },
    "MaskFolderDataModule": {
        "batch_size": 4,
        "num_classes": 3,
        "mask_values": [0, 128, 255],
        "mask_suffix": "_mask",
        "patient_pattern": "^([^_]+)_",
        "val_fraction": 0.25,
        "test_fraction": 0.25,
        "seed": 3,
        "image_size": [16, 32],
        "mean": [0.25, 0.5, 0.5],
        "std": [0.5, 0.25, 0.5],
        "augment": True,
        "train_transform": {"class_path": "monai.transforms.RandFlipd", "init_args": {"keys": ["image", "label"]}},
        "predict_root": "images",
        "num_workers": 0,
        "max_memory_gb": 0.5,
        "cache_dir": "cache",
    },
    "PCamDataModule": {
        "batch_size": 8,
        "num_workers": 0,
        "val_fraction": 0.25,
        "test_fraction": 0.25,
        "seed": 3,
        "cache_dir": "cache",
    },
    "VolumeDataModule": {
        "batch_size": 2,
        "patch_size": [8, 8, 4],
        "patches_per_volume": 2,
        "foreground_fraction": 0.25,
        "num_classes": 3,
        "ignore_index": 255,
        "channel_files": False,
        "patient_pattern": "^([^_]+)_",
        "val_fraction": 0.25,
        "test_fraction": 0.25,
        "seed": 3,
        "normalization": "none",
        "intensity_range": [0.0, 256.0],
        "train_transform": {"class_path": "monai.transforms.RandFlipd", "init_args": {"keys": ["image", "label"]}},
        "num_workers": 0,
        "predict_root": "images",
        "max_memory_gb": 0.5,
        "cache_dir": "cache",
    },
}


def test_what_holds_no_number_of_numpy_is_the_same_object() -> None:
    """Other parts of the checkpoint may refer to the same object."""
    shared = [1, {"a": (2.0, "b")}]
    content = {"x": shared, "y": shared}
    assert python_scalars(content) is content
    assert content == {"x": [1, {"a": (2.0, "b")}], "y": [1, {"a": (2.0, "b")}]}
    assert content["x"] is content["y"] is shared


class Activation(str, enum.Enum):
    softmax = "softmax"
    step = "step"


def numpy_scalars(value: Any) -> Any:
    """Return a value as a NumPy scalar; a text as an enum member, or as a path."""
    if isinstance(value, dict):
        return {np.str_(key): numpy_scalars(each) for key, each in value.items()}
    if isinstance(value, list):
        return [numpy_scalars(each) for each in value]
    kinds = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_, type(None): lambda _: None}
    return kinds[type(value)](value)


def arrays(value: Any) -> Any:
    """Return values as arrays, also without dimensions; the numbers are exact in half precision."""
    if isinstance(value, dict):
        return {key: arrays(each) for key, each in value.items()}
    return None if value is None else np.array(value, dtype=np.float16 if isinstance(value, float) else None)


def tensors_and_other_clothes(value: Any) -> Any:
    """Return values as torch scalars, enum members and paths."""
    if isinstance(value, dict):
        return {key: tensors_and_other_clothes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [tensors_and_other_clothes(each) for each in value]
    if isinstance(value, str):
        return Activation(value) if value in Activation.__members__ else Path(value)
    return None if value is None else torch.tensor(value)


CLOTHES = [numpy_scalars, arrays, tensors_and_other_clothes]
each_clothes = pytest.mark.parametrize("clothe", CLOTHES, ids=[clothe.__name__ for clothe in CLOTHES])


def clothed(arguments: dict[str, Any], clothe: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: clothe(value) for name, value in arguments.items()}


def same(found: Any, expected: Any) -> bool:
    """Return whether values and their types are the same."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)
    if isinstance(found, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def images(classes: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(4, 1, 16, 16), torch.arange(4) % classes), batch_size=2)


def masks() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(4, 1, 16, 16), torch.randint(2, (4, 1, 16, 16))), batch_size=2)


def saved(run: Trainer, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path and content of a checkpoint, read as Lightning and this package read it by default."""
    path = folder / "last.ckpt"
    run.save_checkpoint(path, weights_only=False)
    return path, torch.load(path, weights_only=True)


class TestTasks:
    def test_all_are_here(self):
        assert tasks.__all__ == sorted(TASKS)
        for name, arguments in TASKS.items():
            parameters = inspect.signature(getattr(tasks, name)).parameters
            assert set(parameters) == {*arguments, *OBJECTS & set(parameters)}

    @each_clothes
    @pytest.mark.parametrize("name", TASKS)
    def test_checkpoint(self, name: str, clothe: Callable[[Any], Any], tmp_path: Path):
        cls, arguments = getattr(tasks, name), TASKS[name]
        task = cls(np.str_(MODELS[name]), **clothed(arguments, clothe))
        loader = images(10) if name == "ClassificationTask" else masks()
        run = trainer(max_steps=1)
        run.fit(task, loader, loader)
        path, checkpoint = saved(run, tmp_path)
        found = dict(checkpoint["hyper_parameters"])
        assert found.pop("model") == MODELS[name]
        for other in ("lr_scheduler", "loss", "metrics", "inferer"):  # None
            assert found.pop(other, None) is None
        assert same(found, arguments)
        loaded = cls.load_from_checkpoint(path)
        assert same(dict(loaded.hparams), dict(task.hparams))
        assert same(dict(task.hparams_initial), dict(task.hparams))

    @each_clothes
    def test_arguments_are_used_as_plain_values(self, clothe: Callable[[Any], Any]):
        task = SegmentationTask("attention_unet", **clothed(TASKS["SegmentationTask"], clothe))
        for name in ("num_classes", "threshold", "activation", "lr_scheduler_frequency", "lr_scheduler_strict"):
            assert same(getattr(task, name), TASKS["SegmentationTask"][name])

    def test_arguments_of_a_subclass(self, tmp_path: Path):
        class Mine(ClassificationTask):
            def __init__(self, width: int, weights: Sequence[float], network: nn.Module, make: Callable) -> None:
                super().__init__(network, num_classes=np.int64(4))

        network = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
        task = Mine(np.int32(7), np.array([0.5, 2.0]), network, lambda: 1)
        run = trainer(max_steps=1)
        run.fit(task, images(4), images(4))
        path, checkpoint = saved(run, tmp_path)
        found = checkpoint["hyper_parameters"]
        assert same([found[name] for name in ("width", "weights", "num_classes")], [7, [0.5, 2.0], 4])
        assert not {"network", "model", "make", "optimizer"} & found.keys()
        loaded = Mine.load_from_checkpoint(path, network=network, make=lambda: 1)
        assert same(dict(loaded.hparams), dict(task.hparams))


def test_a_network_is_not_saved_to_see_whether_it_can_be_loaded(monkeypatch: pytest.MonkeyPatch):
    assert not_loadable({"a": 1, "b": [np.float64(1)], "c": "x", "d": {"e": np.zeros(1)}}) == ["b", "d"]
    monkeypatch.setattr(torch, "save", lambda *args: pytest.fail("it may be as large as the memory"))
    assert not_loadable({"network": nn.Linear(1, 1)}) == ["network"]


class TestDataModules:
    @pytest.fixture
    def roots(self, fake_cifar10, fake_lgg, fake_pcam, tmp_path, monkeypatch) -> dict[str, Path]:
        monkeypatch.chdir(tmp_path)
        write_mask_folder(tmp_path / "nuclei")
        for path in sorted((tmp_path / "nuclei" / "masks").iterdir()):
            path.rename(path.with_stem(f"{path.stem}_mask"))
        write_volumes(tmp_path / "scans", shape=(12, 20, 18), classes=2)
        return {
            "CIFAR10DataModule": fake_cifar10,
            "LGGDataModule": fake_lgg,
            "MaskFolderDataModule": tmp_path / "nuclei",
            "PCamDataModule": fake_pcam,
            "VolumeDataModule": tmp_path / "scans",
            "ImageFolderDataModule": write_image_folder(tmp_path / "folders", classes=2, train=8, val=1),
        }

    def test_all_are_here(self):
        assert data_modules.__all__ == sorted(DATA)
        for name, arguments in DATA.items():
            parameters = inspect.signature(getattr(data_modules, name)).parameters
            assert set(parameters) == {*arguments, *{"root"} & set(parameters)}

    @each_clothes
    @pytest.mark.parametrize("name", DATA)
    def test_checkpoint(self, name: str, clothe: Callable[[Any], Any], roots: dict[str, Path], tmp_path: Path):
        arguments = dict(DATA[name])
        if name in roots:
            arguments["root"] = str(roots[name])
        cls = getattr(data_modules, name)
        data = cls(**clothed(arguments, clothe))
        if name == "LGGDataModule":
            task: LightningModule = SegmentationTask(nn.Conv2d(3, 1, 1))
        elif name == "VolumeDataModule":
            task = SegmentationTask(nn.Conv3d(1, 3, 1), num_classes=3, activation="softmax", ignore_index=255)
        elif name == "MaskFolderDataModule":
            task = SegmentationTask(nn.Conv2d(3, 3, 1), num_classes=3, activation="softmax")
        else:
            task = ClassificationTask(nn.Sequential(nn.Flatten(), nn.LazyLinear(classes := data.num_classes)), classes)
            task(next(iter_of(data))[:1])
        run = trainer(max_steps=1, num_sanity_val_steps=0, limit_val_batches=0)
        run.fit(task, datamodule=data)
        path, checkpoint = saved(run, tmp_path)
        found = dict(checkpoint["datamodule_hyper_parameters"])
        found.pop("patients", None)
        assert same(found, arguments)
        loaded = cls.load_from_checkpoint(path)
        found = dict(loaded.hparams)
        found.pop("patients", None)
        assert same(found, arguments)

    def test_arguments_of_a_subclass(self):
        class Mine(DigitsDataModule):
            def __init__(self, share: float, transform: Callable, **kwargs):
                super().__init__(**kwargs)

        data = Mine(np.float32(0.5), len, batch_size=np.uint8(16))
        assert same(dict(data.hparams), {"share": 0.5, "batch_size": 16, "val_fraction": 0.1, "seed": 0})
        data.save_hyperparameters({"later": np.int64(1)})
        assert same(data.hparams["later"], 1)
        assert same(data.hparams_initial["later"], 1)


def iter_of(data: LightningDataModule):
    data.prepare_data()
    data.setup("fit")
    return iter([data.on_after_batch_transfer(batch, 0)[0] for batch in [next(iter(data.train_dataloader()))]])


class NoPickle:
    def __reduce__(self):
        raise NotImplementedError


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: DigitsDataModule(seed=np.random.default_rng(0)), "seed is of type Generator, and"),
            (lambda: DigitsDataModule(val_fraction=Fraction(1, 10)), "val_fraction is of type Fraction, and"),
            (lambda: CIFAR10DataModule(augment=slice(1)), "augment is of type slice, and"),
            (lambda: LGGDataModule(max_memory_gb=np.timedelta64(1, "ns")), "max_memory_gb is of type timedelta64, and"),
            (lambda: PCamDataModule(cache_dir=NoPickle()), "cache_dir is of type NoPickle, and"),
            (lambda: PCamDataModule(cache_dir=object()), "cache_dir is of type object, and"),
            (lambda: ClassificationTask("resnet20", num_classes=Fraction(2)), "num_classes is of type Fraction, and"),
            (lambda: SegmentationTask(nn.Conv2d(3, 1, 1), threshold=Fraction(1, 2)), "threshold is of type Fraction"),
            (
                lambda: ClassificationTask("resnet20", 10, lr_scheduler_frequency=Fraction(2)),
                "lr_scheduler_frequency is of type Fraction",
            ),
        ],
    )
    def test_what_has_no_plain_value(self, make: Callable[[], object], message: str):
        with pytest.raises(ValueError, match=message + ".* pass a number, a text, or a list or dict of these"):
            make()

    def test_within_an_argument(self):
        with pytest.raises(
            ValueError, match=r"model_kwargs\['layers'\]\[1\] is the class ReLU, .* pass it as the mode"
        ):
            ClassificationTask("mobilenetv2_100", 10, model_kwargs={"layers": [1, nn.ReLU]})

    @pytest.mark.parametrize("frequency", [0, -2])
    def test_frequency(self, frequency: int):
        with pytest.raises(ValueError, match=f"lr_scheduler_frequency must be at least 1, got {frequency}"):
            ClassificationTask("resnet20", 10, lr_scheduler_frequency=frequency)


class TestPlainValues:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (np.longdouble(0.5), 0.5),
            (np.complex64(1j), 1j),
            (np.bytes_(b"a"), b"a"),
            (np.array([[1, 2]]), [[1, 2]]),
            (np.array([None, 1], dtype=object), [None, 1]),
            (range(2), [0, 1]),
            (torch.Size([2, 3]), (2, 3)),
            (frozenset({1}), {1}),
            (enum.IntEnum("Size", {"small": 3}).small, 3),
            ({np.int64(1): (np.float64(2.0),)}, {1: (2.0,)}),
            (torch.float16, torch.float16),  # torch.load accepts it
        ],
        ids=repr,
    )
    def test_of_other_kinds(self, value: Any, expected: Any):
        assert same(plain_value("value", value), expected)

    def test_a_tensor_stays_one(self):
        value = torch.randn(3)
        assert plain_values(value=value)[0] is value


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class TestWhatElseIsInCheckpoints:
    """Optimizers, schedulers and callbacks keep the numbers that they got."""

    def checkpoint(self, folder: Path, callbacks: Sequence[Any] = (), **arguments: Any) -> dict[str, Any]:
        def task() -> ClassificationTask:
            return ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(256, 4)), 4, **arguments)

        run = trainer(max_epochs=2, callbacks=list(callbacks))
        run.fit(task(), images(4), images(4))
        path, checkpoint = saved(run, folder)
        trainer(max_epochs=3, callbacks=list(callbacks)).fit(task(), images(4), images(4), ckpt_path=path)
        return checkpoint

    @pytest.mark.parametrize(
        "make",
        [
            partial(torch.optim.SGD, lr=np.float64(0.5), momentum=np.float32(0.5), nesterov=np.bool_(True)),
            partial(torch.optim.Adam, lr=np.float64(0.5), betas=(np.float64(0.5), np.float64(0.5))),
            partial(torch.optim.AdamW, lr=np.array(0.5), weight_decay=np.float64(0.5)),
        ],
        ids=["SGD", "Adam", "AdamW"],
    )
    def test_optimizer(self, make: Callable, tmp_path: Path):
        (state,) = self.checkpoint(tmp_path, optimizer=make)["optimizer_states"]
        assert same(state["param_groups"][0]["lr"], 0.5)

    def test_a_learning_rate_that_is_a_tensor_stays_one(self, tmp_path: Path):
        optimizer = partial(torch.optim.Adam, lr=torch.tensor(0.5))
        (state,) = self.checkpoint(tmp_path, optimizer=optimizer)["optimizer_states"]
        assert isinstance(state["param_groups"][0]["lr"], torch.Tensor)

    # Lightning warns about a schedule that this test steps by epochs.
    @pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
    # SequentialLR of torch 2.6 warns about its own call.
    @pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
    @pytest.mark.parametrize(
        "make",
        [
            lambda o: schedules.LambdaLR(o, lambda epoch: np.cos(epoch)),
            lambda o: schedules.StepLR(o, np.int64(1), gamma=np.float64(0.5)),
            lambda o: schedules.MultiStepLR(o, milestones=np.array([1, 3]), gamma=np.array(0.5)),
            lambda o: schedules.CosineAnnealingLR(o, T_max=np.int64(4), eta_min=np.float64(0.01)),
            lambda o: schedules.OneCycleLR(o, max_lr=np.float64(0.5), total_steps=9, pct_start=np.float64(0.25)),
            lambda o: schedules.PolynomialLR(o, total_iters=np.int64(4), power=np.float64(0.9)),
            lambda o: schedules.SequentialLR(
                o,
                [schedules.ConstantLR(o, np.float64(0.5)), schedules.ExponentialLR(o, np.float64(0.5))],
                [np.int64(1)],
            ),
            lambda o: schedules.ReduceLROnPlateau(o, factor=np.float64(0.5), threshold=np.float64(0.5)),
        ],
        ids=["Lambda", "Step", "MultiStep", "Cosine", "OneCycle", "Polynomial", "Sequential", "Plateau"],
    )
    def test_scheduler(self, make: Callable, tmp_path: Path):
        checkpoint = self.checkpoint(tmp_path, optimizer=sgd, lr_scheduler=make)
        assert type(checkpoint["optimizer_states"][0]["param_groups"][0]["lr"]) is float

    def test_types_of_containers_are_kept(self, tmp_path: Path):
        checkpoint = self.checkpoint(
            tmp_path, optimizer=sgd, lr_scheduler=lambda o: schedules.MultiStepLR(o, milestones=np.array([1, 3, 3]))
        )
        assert same(checkpoint["lr_schedulers"][0]["milestones"], Counter({3: 2, 1: 1}))

    def test_callback(self, tmp_path: Path):
        stopping = EarlyStopping("val/loss", patience=np.int64(5), min_delta=np.float64(0.1))
        (state,) = self.checkpoint(tmp_path, callbacks=[stopping])["callbacks"].values()
        assert same(state["patience"], 5)
