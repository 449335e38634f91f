import mmap
import pickle

import numpy as np
import pytest
import torch
from numbered import NumberedDataModule

from lightning_znorm.data.array_file import ArrayFile
from lightning_znorm.data.datasets import InMemoryImages, MappedImages


@pytest.fixture
def images(tmp_path) -> tuple[ArrayFile, np.ndarray]:
    """Return 1,000 images of 5x4 pixels, in a file after a header of 77 bytes."""
    array = np.random.default_rng(0).integers(0, 256, (1000, 5, 4, 3), dtype=np.uint8)
    (tmp_path / "images").write_bytes(bytes(77) + array.tobytes() + b"tail")
    return ArrayFile(tmp_path / "images", 77, array.shape), array


class TestMappedImages:
    def test_batches_and_items(self, images):
        file, array = images
        labels = np.arange(1000) % 7
        data = MappedImages(file, labels)
        indices = [999, 0, 500, 0]
        taken, of_them = data.__getitems__(indices)
        assert taken.dtype == torch.uint8
        assert taken.shape == (4, 3, 5, 4)
        assert np.array_equal(taken.permute(0, 2, 3, 1), array[indices])
        assert of_them.tolist() == labels[indices].tolist()
        image, label = data[999]
        assert torch.equal(image, taken[0])
        assert label == labels[999]
        assert len(data) == 1000

    def test_some_of_the_images(self, images):
        file, array = images
        rows = np.array([5, 70, 900])
        data = MappedImages(file, np.array([1, 0, 1]), rows)
        assert len(data) == 3
        taken, labels = data.__getitems__([2, 0])
        assert np.array_equal(taken.permute(0, 2, 3, 1), array[[900, 5]])
        assert labels.tolist() == [1, 1]

    def test_a_batch_is_a_copy(self, images):
        file, array = images
        data = MappedImages(file, np.zeros(1000, dtype=np.int64))
        data.__getitems__([0])[0].zero_()
        assert np.array_equal(data[0][0].permute(1, 2, 0), array[0])

    def test_pickled_without_what_is_mapped(self, images):
        file, array = images
        data = MappedImages(file, np.zeros(1000, dtype=np.int64))
        data.__getitems__([0])
        packed = pickle.dumps(data)
        assert len(packed) < 20_000
        again = pickle.loads(packed)
        assert np.array_equal(again[7][0].permute(1, 2, 0), array[7])

    @pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="the system takes no advice")
    def test_blocks_are_announced_whole_and_once(self, tmp_path, monkeypatch):
        size = 48 * 48 * 3
        (tmp_path / "images").write_bytes(bytes(100 + 200 * size))
        announced = []

        class Mapping(mmap.mmap):
            def madvise(self, option, start, length):
                assert option == mmap.MADV_WILLNEED
                super().madvise(option, start, length)
                announced.append((start, start + length))

        monkeypatch.setattr(mmap, "mmap", Mapping)
        data = MappedImages(ArrayFile(tmp_path / "images", 100, (200, 48, 48, 3)), np.zeros(200, dtype=np.int64))
        data.__getitems__([0, 3, 130, 199])
        for (start, end), (first, last) in zip(announced, [(0, 32), (128, 160), (192, 200)], strict=True):
            assert start % mmap.PAGESIZE == 0
            assert start <= 100 + first * size < start + mmap.PAGESIZE
            assert end == 100 + last * size
        data.__getitems__([7, 140])
        assert len(announced) == 3
        data.__getitems__([7, 70])
        assert len(announced) == 4


class TestInMemoryImages:
    rng = np.random.default_rng(0)
    data = InMemoryImages(rng.integers(0, 256, (7, 3, 4, 5), dtype=np.uint8), np.arange(7))

    def test_a_batch_is_its_items_stacked(self):
        indices = [5, 0, 6, 5]
        images, labels = self.data.__getitems__(indices)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert labels.tolist() == indices
        items = [self.data[i] for i in indices]
        assert torch.equal(images, torch.stack([image for image, _ in items]))
        assert torch.equal(labels, torch.stack([label for _, label in items]))

    def test_a_batch_is_a_copy(self):
        images, _ = self.data.__getitems__([0])
        before = self.data.images.copy()
        images.zero_()
        assert np.array_equal(self.data.images, before)

    def test_the_loader_takes_whole_batches(self, monkeypatch):
        taken = []
        monkeypatch.setattr(InMemoryImages, "__getitem__", lambda *_: pytest.fail("image by image"))
        getitems = InMemoryImages.__getitems__
        monkeypatch.setattr(InMemoryImages, "__getitems__", lambda s, i: (taken.append(i), getitems(s, i))[1])
        data = NumberedDataModule(batch_size=32)
        data.setup("fit")
        assert [len(labels) for _, labels in data.val_dataloader()] == [20]
        assert taken == [list(range(20))]
