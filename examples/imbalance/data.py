"""Data with a rare class, small enough for one CPU core: LGG at 96x96 pixels, and digits of which one is rare."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_znorm.data import DigitsDataModule, LGGDataModule
from lightning_znorm.data.datasets import MaskedImages

SIZE = 96


class SmallLGG(LGGDataModule):
    """LGG slices at 96x96 pixels, each of which is the mean of the pixels that it covers.

    A pixel of a mask is marked if at least half of what it covers is.
    """

    def setup(self, stage: str) -> None:
        """Read the slices and shrink them, once for all stages."""
        is_new = not self.patients
        super().setup(stage)
        if not is_new:
            return
        sets = (self.train_set, self.val_set, self.test_set)
        large = self.train_set.images  # of all sets
        small = np.stack([_shrunk(each) for each in large])
        self.train_set, self.val_set, self.test_set = (
            MaskedImages(small, each.rows, each.cases, transform=each.transform) for each in sets
        )
        self.predict_set = self.test_set


def _shrunk(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return red, green, blue and the mask of a slice at 96x96 pixels."""
    pixels = image * np.array([1, 1, 1, 255], np.uint8)[:, None, None]
    small = np.stack([Image.fromarray(each).resize((SIZE, SIZE), Image.Resampling.BOX) for each in pixels])
    small[3] = small[3] >= 128
    return small


class RareDigits(DigitsDataModule):
    """The digits, told apart into one and all others, with so few of that one that it makes 2 % of each set.

    The images are the same for every seed and method.
    """

    num_classes = 2
    rare, share = 8, 0.02

    def load(self, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Read all other digits, and as many of the rare one as its share allows."""
        images, digits = super().load(train)
        others = np.flatnonzero(digits != self.rare)
        count = round(self.share / (1 - self.share) * len(others))
        rows = np.sort(np.concatenate([others, np.flatnonzero(digits == self.rare)[:count]]))
        return images[rows], (digits[rows] == self.rare).astype(np.int64)
