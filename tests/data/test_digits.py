from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lightning_znorm.data import DigitsDataModule
from lightning_znorm.data.datasets import InMemoryImages


def counted(*data_sets) -> Counter:
    pairs = ((image.tobytes(), int(label)) for d in data_sets for image, label in zip(d.images, d.labels, strict=True))
    return Counter(pairs)


def set_up(**kwargs) -> DigitsDataModule:
    data = DigitsDataModule(**kwargs)
    data.setup("fit")
    data.setup("test")
    return data


def test_the_three_sets_are_all_the_digits():
    data = set_up()
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (1293, 144, 360)
    digits = load_digits()
    every = InMemoryImages(digits.images.astype(np.uint8), digits.target)
    assert counted(data.train_set, data.val_set, data.test_set) == counted(every)


def test_the_seed_draws_validation_but_not_test():
    first, again, other = set_up(), set_up(), set_up(seed=1)
    assert counted(first.val_set) == counted(again.val_set)
    assert counted(first.val_set) != counted(other.val_set)
    assert np.array_equal(first.test_set.images, other.test_set.images)
    assert np.array_equal(first.test_set.labels, other.test_set.labels)


@pytest.mark.parametrize("val_fraction", [0.1, 0.3])
def test_every_class_has_its_share(val_fraction):
    data = set_up(val_fraction=val_fraction)
    classes = np.bincount(np.concatenate([data.train_set.labels, data.val_set.labels]))
    assert np.abs(np.bincount(data.val_set.labels) - val_fraction * classes).max() <= 1
    assert np.abs(np.bincount(data.test_set.labels) - 0.25 * classes).max() <= 1


def test_mean_and_std_are_those_of_all_but_the_test_set():
    data = set_up()
    pixels = np.concatenate([data.train_set.images, data.val_set.images]) / data.max_value
    assert data.mean[0] == pytest.approx(pixels.mean(), abs=5e-5)
    assert data.std[0] == pytest.approx(pixels.std(), abs=5e-5)
    assert pixels.max() == 1


def test_batches():
    data = set_up(batch_size=100)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (100, 1, 8, 8)
    assert labels.shape == (100,)
    assert data.num_classes == len(set(data.train_set.labels)) == 10
