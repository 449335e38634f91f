"""Base classes of the data modules: what all of them share, and what those whose images fit in memory do."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from typing_extensions import override

from lightning_znorm.arguments import checked_integer, checked_number
from lightning_znorm.data.datasets import Batch, Images, InMemoryImages, Labels
from lightning_znorm.data.loader import ResumableLoader
from lightning_znorm.data.samplers import EpochSampler
from lightning_znorm.data.splits import stratified_split
from lightning_znorm.errors import ZNormRuntimeError, ZNormValueError
from lightning_znorm.hyperparameters import PlainHyperparameters, plain_values
from lightning_znorm.requirements import require


class ImageDataModule(PlainHyperparameters, LightningDataModule, ABC):
    """Base of the data modules of images.

    A subclass sets ``train_set`` and ``val_set``, or ``test_set``, in `setup`, and describes its images by the class
    attributes. Images travel as uint8 and are normalized on the device to zero mean and unit standard deviation per
    channel.

    The order of the training images follows from two numbers: one that torch's generator draws when a training begins,
    and the epoch. So the order is the same with any number of workers, and a training that is resumed from a checkpoint
    continues in its order after the last processed batch, in the middle of an epoch too.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the training images that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.
        num_workers: Worker processes per loader and process.

    Raises:
        ValueError: If one of these is out of range.
        TypeError: If one is not a number.
        ImportError: If a package that the data module imports is missing.
    """

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]
    max_value: int
    """Largest value that a pixel may have."""
    mean: tuple[float, ...]
    """Mean of each channel, in units of `max_value`."""
    std: tuple[float, ...]
    """Standard deviation of each channel, in units of `max_value`."""
    # Packages that a class imports besides those that torch and lightning need, without those of its base classes.
    _packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, batch_size: int, val_fraction: float, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        packages = [package for cls in type(self).__mro__ for package in vars(cls).get("_packages", ())]
        require(type(self).__name__, *dict.fromkeys(packages))
        batch_size, val_fraction, seed, num_workers = plain_values(
            batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers
        )
        self.batch_size = checked_integer("batch_size", batch_size, minimum=1, bits=31)
        self.num_workers = checked_integer("num_workers", num_workers, minimum=0, bits=31)
        self.seed = checked_integer("seed", seed, minimum=0, bits=32)
        self.val_fraction = checked_number("val_fraction", val_fraction)
        if not 0 < val_fraction < 1:
            raise ZNormValueError(
                f"val_fraction is the share of training images to validate on, in (0, 1): {val_fraction}."
            )
        self._order_seed: int | None = None
        self._sampler: EpochSampler | None = None

    @override
    def setup(self, stage: str) -> None:
        """Let a training that begins draw new orders."""
        if stage == "fit":
            self._order_seed = self._sampler = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the orders of the training images."""
        return {"order_seed": self._order_seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the orders of the training that is resumed."""
        self._order_seed = state_dict.get("order_seed")
        if self._sampler is not None and self._order_seed is not None:
            # A schedule that asks for the number of batches makes the loader early, and some strategies restore late.
            self._sampler.seed = self._order_seed

    def class_frequencies(self) -> list[float]:
        """Return the share of each class among the training labels, after ``setup("fit")``.

        Raises:
            RuntimeError: Before ``setup("fit")``.
            ValueError: If the training set has no ``labels``, an array of class numbers.
        """
        self.require_train_set()
        labels, num_classes = getattr(self.train_set, "labels", None), getattr(self, "num_classes", 0)
        if labels is None:
            name, dataset = type(self).__name__, type(self.train_set).__name__
            raise ZNormValueError(
                f"{name} cannot count its classes, because its train_set, {dataset}, has no labels: define "
                f"class_frequencies() in {name}, which returns the share of each class."
            )
        counts = np.bincount(labels, minlength=num_classes)
        return [float(share) for share in counts / counts.sum()]

    def require_train_set(self) -> None:
        """Raise a ``RuntimeError`` before ``setup("fit")`` has made the training set."""
        if not hasattr(self, "train_set"):
            raise ZNormRuntimeError(f'{type(self).__name__} has no training set yet: call its setup("fit") first.')

    def loader(self, dataset: Dataset[Any], shuffle: bool, batch_size: int | None = None) -> DataLoader[Batch]:
        """Return the loader of one of the sets.

        Args:
            dataset: The set. One with a method ``collate`` has its batches collated by that.
            shuffle: Whether it is the training set.
            batch_size: Images per batch, by default as many as in training.
        """
        loader, sampler = DataLoader[Any], None
        # A generator for each loader. With torch's own, each iterator would draw a number from it, and a resumed
        # training makes fewer iterators.
        generator = torch.Generator()
        if shuffle:
            seed = self._seed_of_orders()
            loader, sampler = ResumableLoader[Any], self.sampler(dataset, **self.processes(), seed=seed)
            self._sampler = sampler
            generator.manual_seed(seed)
        # By keyword, because Lightning replaces the sampler by its name (for several processes, and to predict).
        made = loader(
            dataset,
            batch_size=self.batch_size if batch_size is None else batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # A dataset that gives whole batches leaves nothing to collate.
            collate_fn=getattr(dataset, "collate", default_convert if hasattr(dataset, "__getitems__") else None),
            pin_memory=self.pin_memory,
            generator=generator,
        )
        if isinstance(made, ResumableLoader):
            made.trainer = self.trainer
        return made

    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> EpochSampler:
        """Return the sampler of the training images."""
        return EpochSampler(dataset, num_replicas, rank, seed)

    def processes(self) -> dict[str, int]:
        """Return number and rank of the processes that share the images, as samplers take them; empty for one."""
        # None without a trainer, and in one process.
        return getattr(self.trainer, "distributed_sampler_kwargs", None) or {}

    def _seed_of_orders(self) -> int:
        """Return the seed of all orders of a training: a resumed training's, or one that torch's generator draws."""
        if self._order_seed is None or self.trainer is None:
            seed = int(torch.randint(2**31, ()))
            # Broadcast, because the generators of the processes may differ.
            self._order_seed = seed if self.trainer is None else self.trainer.strategy.broadcast(seed)
        return self._order_seed

    def augment_batch(self, images: Tensor) -> Tensor:
        """Return a batch of training images, uint8 on the device, augmented; by default as it is."""
        return images

    @property
    def pin_memory(self) -> bool:
        """Whether batches go to a CUDA device: only copies from pinned memory leave the CPU free to run ahead of it."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training batches, in a new order each epoch."""
        return self.loader(self.train_set, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of validation batches."""
        return self.loader(self.val_set, shuffle=False)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test batches."""
        return self.loader(self.test_set, shuffle=False)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of test batches."""
        return self.loader(self.test_set, shuffle=False)

    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (in training only) and normalize, on the device."""
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            images = self.augment_batch(images)
        return self.normalized(images), labels

    def normalized(self, images: Tensor) -> Tensor:
        """Normalize uint8 images, in the precision of the network's input."""
        mean, std = _mean_and_std(self.mean, self.std, self.max_value, images.device)
        # In place, because on a CPU allocating memory costs more than the arithmetic.
        images = images.float().sub_(mean).div_(std)
        return self.in_precision(images)

    def in_precision(self, values: Tensor) -> Tensor:
        """Convert floats to the precision of the trainer, if there is one."""
        if self.trainer is None:
            return values
        # Lightning converts floats to the precision of "16-true" and the like before `on_after_batch_transfer`, where
        # the images are still uint8.
        converted: Tensor = self.trainer.precision_plugin.convert_input(values)
        return converted


class InMemoryDataModule(ImageDataModule):
    """Base of the data modules whose images fit in memory.

    A subclass reads its images in `load` and describes them by the class attributes. There are no worker processes:
    indexing an array is faster than passing batches between processes. (On a machine with more than two cores,
    Lightning advises workers all the same.)

    Validation images are split off from the training images, stratified by class. The test images are read only for
    ``test`` and ``predict``.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the training images that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.
    """

    num_classes: int
    _packages: ClassVar[tuple[str, ...]] = ("sklearn",)

    @abstractmethod
    def load(self, train: bool) -> tuple[Images, Labels]:
        """Read all training images (the validation images among them), or all test images."""

    @override
    def setup(self, stage: str) -> None:
        """Read the images that the stage needs."""
        super().setup(stage)
        if stage in ("fit", "validate"):
            train, val = stratified_split(*self.load(train=True), self.val_fraction, self.seed)
            self.train_set, self.val_set = InMemoryImages(*train), InMemoryImages(*val)
        else:
            self.test_set = InMemoryImages(*self.load(train=False))


# Cached on the device. Copying them with every batch, as torchvision's normalize does, would make the CPU wait.
@lru_cache
def _mean_and_std(
    mean: tuple[float, ...], std: tuple[float, ...], max_value: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    pixels = torch.tensor([mean, std], dtype=torch.float32, device=device) * max_value
    return pixels[0].view(-1, 1, 1), pixels[1].view(-1, 1, 1)
