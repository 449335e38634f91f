"""CIFAR-10 for tests: random images in its format, and the real images if they are there."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest


def write_cifar10(root: Path, images_per_batch: int = 40, seed: int = 0) -> dict[str, str]:
    """Write random images in CIFAR-10's own format; return the MD5 sum of each file."""
    rng = np.random.default_rng(seed)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    contents = {
        name: {
            "data": rng.integers(0, 256, (images_per_batch, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(images_per_batch)],
        }
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    }
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    sums = {}
    for name, content in [*contents.items(), ("batches.meta", {"label_names": names})]:
        packed = pickle.dumps(content)
        (folder / name).write_bytes(packed)
        sums[name] = hashlib.md5(packed).hexdigest()
    return sums


@pytest.fixture
def fake_cifar10(tmp_path, monkeypatch) -> Path:
    """Root folder of 200 + 40 random images, in place of CIFAR-10's 50,000 + 10,000."""
    return put_in_place_of_cifar10(tmp_path, monkeypatch)


def put_in_place_of_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch, images_per_batch: int = 40) -> Path:
    """Write random images that torchvision takes for CIFAR-10, and return their root."""
    from torchvision.datasets import CIFAR10  # takes seconds; the process that distributes the tests does not need it

    root = folder / "my data"
    sums = write_cifar10(root, images_per_batch)
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return root


@pytest.fixture(scope="session")
def real_cifar10() -> Path:
    if "ZNORM_DATA" not in os.environ:
        pytest.skip("needs real data: ZNORM_DATA names no folder with it (CONTRIBUTING.md)")
    return Path(os.environ["ZNORM_DATA"]) / "cifar10"
