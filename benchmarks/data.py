"""Images per second of our data path beside torchvision's usual one: ``python -m benchmarks.data``.

Each row is a shuffled epoch of CIFAR-10 in batches of 256, on one CPU thread (and the workers): the median over rounds
in which all rows take their turn. "normalized" ends at the float batch that a network is given, which on a GPU is made
by the GPU; "uint8" is what reaches the device.

``--pcam`` and ``--lgg`` name the roots of PatchCamelyon and of the LGG slices, for rows of their training sets.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, VisionDataset
from torchvision.transforms import Compose, Normalize, ToTensor

from benchmarks.timing import alternating_medians
from lightning_znorm.data import CIFAR10DataModule, LGGDataModule, PCamDataModule
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.data.datasets import Images, InMemoryImages, Labels

BATCH_SIZE = 256


def training_images(root: str | None, count: int) -> tuple[Images, Labels]:
    if root is not None:
        images, labels = CIFAR10DataModule(root).load(train=True)
        return images[:count], labels[:count]
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, count)


class GivenCIFAR10(CIFAR10):
    """torchvision's data set, of images that are read already."""

    def __init__(self, images: Images, labels: Labels) -> None:
        transform = Compose([ToTensor(), Normalize(CIFAR10DataModule.mean, CIFAR10DataModule.std)])
        VisionDataset.__init__(self, "", transform=transform)
        self.train = True
        self.data = images.transpose(0, 2, 3, 1)
        self.targets = labels.tolist()


def ours(images: Images, labels: Labels, normalized: bool) -> Callable[[], None]:
    module = CIFAR10DataModule(batch_size=BATCH_SIZE)
    module.train_set = InMemoryImages(images, labels)
    return epoch_of(module, normalized)


def epoch_of(module: ImageDataModule, normalized: bool) -> Callable[[], None]:
    loader = module.train_dataloader()

    def epoch() -> None:
        for batch in loader:
            if normalized:
                module.on_after_batch_transfer(batch, 0)

    return epoch


def torchvisions(images: Images, labels: Labels, workers: int) -> Callable[[], None]:
    loader = DataLoader(GivenCIFAR10(images, labels), BATCH_SIZE, shuffle=True, num_workers=workers)

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def medical_rows(name: str, module: ImageDataModule, rounds: int) -> None:
    module.setup("fit")
    count = len(module.train_set)  # type: ignore[arg-type]
    rows = {f"{name}, {kind}": epoch_of(module, kind == "normalized") for kind in ("uint8", "normalized")}
    for row, value in alternating_medians(rows, rounds=rounds, warmup=1).items():
        print(f"| {row:<34} | {count / value:>8.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of our data path and of torchvision's.")
    parser.add_argument("--root", help="folder that holds cifar-10-batches-py (default: random images of that size)")
    parser.add_argument("--images", type=int, default=50_000, help="images in an epoch (default: all 50,000)")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each row (default: 5)")
    parser.add_argument("--pcam", help="folder that holds pcam, or Kaggle's layout (default: no rows)")
    parser.add_argument("--lgg", help="folder that holds kaggle_3m (default: no rows)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # a second thread gains little, and makes the result depend on what else the machine does
    arrays = training_images(args.root, args.images)
    seconds = alternating_medians(
        {
            "lightning_znorm, uint8": ours(*arrays, normalized=False),
            "lightning_znorm, normalized": ours(*arrays, normalized=True),
            "torchvision, normalized, 0 workers": torchvisions(*arrays, workers=0),
            "torchvision, normalized, 2 workers": torchvisions(*arrays, workers=2),
        },
        rounds=args.rounds,
        warmup=1,
    )
    print(f"| {'data path':<34} | images/s |")
    print(f"| {'-' * 34} | -------: |")
    for name, value in seconds.items():
        print(f"| {name:<34} | {args.images / value:>8.0f} |")
    _, mine, *theirs = seconds.values()
    for name, kind, root in (("PCam", PCamDataModule, args.pcam), ("LGG", LGGDataModule, args.lgg)):
        if root is not None:
            medical_rows(name, kind(root, batch_size=BATCH_SIZE), args.rounds)
    print(f"\nnormalized: {min(theirs) / mine:.1f} times torchvision's faster row")


if __name__ == "__main__":
    main()
