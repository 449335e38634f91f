"""Arguments out of range are refused by name when a data module is made, before files are read or a training begins."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from lightning_znorm.data import (
    CIFAR10DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    LGGDataModule,
    MaskFolderDataModule,
    PCamDataModule,
)
from lightning_znorm.data.base import ImageDataModule

SEGMENTATION = (LGGDataModule, MaskFolderDataModule)
WITH_WORKERS = (ImageFolderDataModule, PCamDataModule, *SEGMENTATION)
MODULES = [CIFAR10DataModule, DigitsDataModule, ImageFolderDataModule, PCamDataModule, *SEGMENTATION]
NAN = math.nan


@pytest.mark.parametrize("made", MODULES)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("batch_size", value, r"must be at least 1 and less than 2\*\*31, got") for value in (0, -3, 10**23)),
        *(("seed", value, r"must be at least 0 and less than 2\*\*32, got") for value in (-1, 2**32)),
        *(("val_fraction", value, r"is the share of training images .*, in \(0, 1\):") for value in (0, 1, -0.1, NAN)),
    ],
)
def test_of_all(made: Callable[..., ImageDataModule], name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} {message} {value}\.$"):
        made(**{name: value})


@pytest.mark.parametrize(
    ("made", "name", "value", "message"),
    [
        *((made, "num_workers", -1, "must be at least 0") for made in WITH_WORKERS),
        *((PCamDataModule, "test_fraction", value, "is the share of") for value in (0, 1, NAN)),
        *(
            (made, "test_fraction", value, "is the share of patients")
            for made in SEGMENTATION
            for value in (0, 0.9, NAN)
        ),
        *((made, "max_memory_gb", value, "must be at least 0, got") for made in SEGMENTATION for value in (-1, NAN)),
        *((made, "image_size", 0, "must be at least 1") for made in SEGMENTATION),
        *((ImageFolderDataModule, "image_size", value, "") for value in (0, 257)),
    ],
)
def test_of_some(made: Callable[..., ImageDataModule], name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}[ =]{message}.*{value}"):
        made(**{name: value})


@pytest.mark.parametrize("value", [None, "2", True, [1]])
@pytest.mark.parametrize(
    ("made", "name"),
    [
        *((made, name) for made in MODULES for name in ("batch_size", "seed", "val_fraction")),
        *((made, "num_workers") for made in WITH_WORKERS),
        *((made, "test_fraction") for made in (PCamDataModule, *SEGMENTATION)),
        *((made, "max_memory_gb") for made in SEGMENTATION),
        *((ImageFolderDataModule, name) for name in ("image_size", "resize_size")),
    ],
)
def test_no_number(made: Callable[..., ImageDataModule], name: str, value: Any) -> None:
    kind = "number" if name in ("val_fraction", "test_fraction", "max_memory_gb") else "whole number"
    with pytest.raises(TypeError, match=rf"^{name} must be a {kind}, got {re.escape(repr(value))}\.$"):
        made(**{name: value})


@pytest.mark.parametrize(
    ("made", "name"),
    [
        *((made, "root") for made in MODULES if made is not DigitsDataModule),
        *((made, "predict_root") for made in SEGMENTATION),
        *((made, "cache_dir") for made in (PCamDataModule, *SEGMENTATION)),
    ],
)
def test_no_folder(made: Callable[..., ImageDataModule], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a path, got 3\.$"):
        made(**{name: 3})
    with pytest.raises(ValueError, match=rf"^{name} is ~nobody-of-this-name/x, and there is no such home directory\.$"):
        made(**{name: "~nobody-of-this-name/x"})


@pytest.mark.parametrize("made", MODULES)
def test_the_ends_of_the_range_are_in_it(made: Callable[..., ImageDataModule]) -> None:
    for seed in (0, 2**32 - 1):
        assert made(batch_size=1, val_fraction=0.001, seed=seed).seed == seed
