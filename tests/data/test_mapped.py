import mmap
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from lightning_znorm.data.array_file import ArrayFile
from lightning_znorm.data.mapped import BlockShuffle, MappedImages


@pytest.fixture
def images(tmp_path) -> tuple[ArrayFile, np.ndarray]:
    """1,000 images of 5x4 pixels, behind a head of 77 bytes."""
    array = np.random.default_rng(0).integers(0, 256, (1000, 5, 4, 3), dtype=np.uint8)
    (tmp_path / "images").write_bytes(bytes(77) + array.tobytes() + b"tail")
    return ArrayFile(tmp_path / "images", 77, array.shape), array


class OfLength(MappedImages):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def order(length: int, epoch: int = 0, **kwargs) -> list[int]:
    sampler = BlockShuffle(OfLength(length), **kwargs)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


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


class TestBlockShuffle:
    @pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 20_000])
    def test_every_image_once(self, length):
        assert sorted(order(length)) == list(range(length))

    def test_blocks_stay_in_their_window(self):
        drawn = np.array(order(4096, block=16, window=512))
        for window in np.split(drawn, 8):
            assert sorted(Counter((window // 16).tolist()).values()) == [16] * 32

    def test_windows_of_equal_size(self):
        drawn = np.array(order(1100, block=10, window=500))  # not 500, 500 and 100
        sizes = [367, 367, 366]
        for window in np.split(drawn, np.cumsum(sizes)[:-1]):
            assert len(set((window // 10).tolist())) in (37, 38)

    def test_mixes_neighbours_and_strangers(self):
        drawn = np.array(order(100_000))
        batches = drawn[: len(drawn) // 256 * 256].reshape(-1, 256)
        blocks = [len(set((batch // 32).tolist())) for batch in batches]
        assert np.mean(blocks) > 150  # of 256 in the window
        # A batch is a sample of the whole: its mean lies about as near as that of images drawn at random.
        spread = batches.mean(1).std() / (100_000 / 12**0.5 / 16)
        assert spread < 2.5  # sqrt(2) is expected, and 16 without blocks of random order

    def test_follows_from_seed_and_epoch(self):
        assert order(1000, seed=3, epoch=5) == order(1000, seed=3, epoch=5)
        orders = [tuple(order(1000, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
        assert len(set(orders)) == 6

    @pytest.mark.parametrize(("length", "processes"), [(1000, 4), (1001, 4), (1003, 2), (3, 8), (10_007, 3)])
    def test_processes_share_the_images(self, length, processes):
        parts = [order(length, num_replicas=processes, rank=rank) for rank in range(processes)]
        each = -(-length // processes)
        assert [len(part) for part in parts] == [each] * processes
        counts = Counter(index for part in parts for index in part)
        assert set(counts) == set(range(length))
        if length >= processes:
            assert sum(count - 1 for count in counts.values()) == each * processes - length < processes

    def test_processes_have_blocks_of_their_own(self):
        parts = [set((np.array(order(6400, num_replicas=4, rank=rank, block=64)) // 64).tolist()) for rank in range(4)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 100
