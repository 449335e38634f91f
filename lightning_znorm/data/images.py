"""What the data modules of images share: a validation split, four loaders, and normalization on the device."""

from abc import ABC
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from typing_extensions import override

from lightning_znorm.data.arguments import check_number
from lightning_znorm.data.loader import ResumableLoader
from lightning_znorm.data.shuffle import EpochShuffle
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.hyperparameters import PlainHyperparameters, plain_values

Labels: TypeAlias = NDArray[np.int64]
"""Shape ``(N,)``."""
Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images of shape ``(N, C, H, W)`` and labels of shape ``(N,)``."""


class ImageDataModule(PlainHyperparameters, LightningDataModule, ABC):
    """Base of the data modules of images.

    A subclass sets ``train_set`` and ``val_set``, or ``test_set``, in `setup`, and says what its images are (the class
    attributes). Images travel as uint8 and are normalized on the device to zero mean and unit standard deviation per
    channel.

    The training images come in an order that follows from a number, drawn by torch's generator when a training begins,
    and from the epoch's: it is the same with any number of workers, and a training that is resumed from a checkpoint
    goes on in its order and behind the last batch that it has had, in the middle of an epoch too.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the training images that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.
        num_workers: Worker processes per loader and process.

    Raises:
        ValueError: If one of these is out of range.
        TypeError: If one is no number.
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

    def __init__(self, batch_size: int, val_fraction: float, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        batch_size, val_fraction, seed, num_workers = plain_values(
            batch_size=batch_size, val_fraction=val_fraction, seed=seed, num_workers=num_workers
        )
        check_number("batch_size", batch_size, int, least=1, bits=31)
        check_number("num_workers", num_workers, int, least=0, bits=31)
        check_number("seed", seed, int, least=0, bits=32)
        check_number("val_fraction", val_fraction, float)
        if not 0 < val_fraction < 1:
            raise ZNormValueError(
                f"val_fraction is the share of training images to validate on, in (0, 1): {val_fraction}."
            )
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.num_workers = num_workers
        self._order_seed: int | None = None
        self._sampler: EpochShuffle | None = None

    @override
    def setup(self, stage: str) -> None:
        """Begin a training with orders of its own."""
        if stage == "fit":
            self._order_seed = self._sampler = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what the orders of the training images are drawn from."""
        return {"order_seed": self._order_seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the orders of the training that is resumed."""
        self._order_seed = state_dict.get("order_seed")
        if self._sampler is not None and self._order_seed is not None:
            # Made already: a schedule asked for the number of batches, under a strategy that restores late.
            self._sampler.seed = self._order_seed

    def loader(self, dataset: Dataset[Any], shuffle: bool) -> DataLoader[Batch]:
        """Make the loader of one of the sets."""
        loader, sampler = DataLoader[Any], None
        # Its own, or each iterator would draw a number from torch's, and resumed trainings make fewer iterators.
        generator = torch.Generator()
        if shuffle:
            seed = self._seed_of_orders()
            loader, sampler = ResumableLoader[Any], self.sampler(dataset, **self._processes(), seed=seed)
            self._sampler = sampler
            generator.manual_seed(seed)
        # By keyword, else Lightning cannot replace the sampler (for several processes, and to predict).
        made = loader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # A batch is taken as a whole where it can be.
            collate_fn=default_convert if hasattr(dataset, "__getitems__") else None,
            pin_memory=self.pin_memory,
            generator=generator,
        )
        if isinstance(made, ResumableLoader):
            made.trainer = self.trainer
        return made

    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> EpochShuffle:
        """Make what draws the order of the training images."""
        return EpochShuffle(dataset, num_replicas, rank, seed)

    def _processes(self) -> dict[str, int]:
        # None without a trainer, and in one process.
        return getattr(self.trainer, "distributed_sampler_kwargs", None) or {}

    def _seed_of_orders(self) -> int:
        """Draw the seed of all orders of a training, from torch's generator, unless the training is resumed."""
        if self._order_seed is None or self.trainer is None:
            seed = int(torch.randint(2**31, ()))
            # The same in all processes, whose generators need not agree.
            self._order_seed = seed if self.trainer is None else self.trainer.strategy.broadcast(seed)
        return self._order_seed

    def augment_batch(self, images: Tensor) -> Tensor:
        """Change a batch of training images, uint8 on the device; by default not at all."""
        return images

    @property
    def pin_memory(self) -> bool:
        """Whether batches go to a CUDA device: only copies from pinned memory leave the CPU free to run ahead of it."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Training batches, in a new order each epoch."""
        return self.loader(self.train_set, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches."""
        return self.loader(self.val_set, shuffle=False)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches."""
        return self.loader(self.test_set, shuffle=False)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test batches."""
        return self.loader(self.test_set, shuffle=False)

    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (in training alone) and normalize, on the device."""
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            images = self.augment_batch(images)
        return self.normalized(images), labels

    def normalized(self, images: Tensor) -> Tensor:
        """Normalize uint8 images, in the precision that the network is given."""
        mean, std = _mean_and_std(self.mean, self.std, self.max_value, images.device)
        images = images.float().sub_(mean).div_(std)  # in place: on a CPU, fresh memory costs more than sums
        return self.in_precision(images)

    def in_precision(self, values: Tensor) -> Tensor:
        """Convert floats to the precision of the trainer, if there is one."""
        if self.trainer is None:
            return values
        # Lightning converts to the precision of "16-true" and its like before the hook above, when there are no floats.
        converted: Tensor = self.trainer.precision_plugin.convert_input(values)
        return converted


def stratified_indices(labels: Labels, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw ``fraction`` of the indices, the same share of every class; return those that are left, and the drawn.

    Raises:
        ValueError: If there are too few images.
    """
    from sklearn.model_selection import train_test_split

    try:
        rest, taken = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ZNormValueError(
            f"{len(labels)} images of {len(np.unique(labels))} classes cannot be split so that a share of {fraction} "
            "and what is left both hold images of every class: add images, or change the share."
        ) from error
    return rest, taken


# Kept on the device: to send them with every batch would make the CPU wait for it.
@lru_cache
def _mean_and_std(
    mean: tuple[float, ...], std: tuple[float, ...], max_value: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    pixels = torch.tensor([mean, std], dtype=torch.float32, device=device) * max_value
    return pixels[0].view(-1, 1, 1), pixels[1].view(-1, 1, 1)
