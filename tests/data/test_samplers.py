"""Orders of images: each image once, from numbers only, and shared among the processes."""

from collections import Counter

import numpy as np
import pytest

from lightning_znorm.data.datasets import MappedImages
from lightning_znorm.data.samplers import BlockSampler, EpochSampler, SeededSampler

SHUFFLES = pytest.mark.parametrize("shuffle", [EpochSampler, SeededSampler, BlockSampler])


class OfLength(MappedImages):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def order(length: int, epoch: int = 0, **kwargs) -> list[int]:
    sampler = BlockSampler(OfLength(length), **kwargs)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    return drawn


class TestEpochSampler:
    @pytest.mark.parametrize(("length", "processes"), [(10, 1), (10, 3), (2, 4)])
    def test_processes_share_the_images(self, length, processes):
        parts = [list(EpochSampler(range(length), processes, rank)) for rank in range(processes)]
        assert {len(part) for part in parts} == {-(-length // processes)}
        assert {index for part in parts for index in part} == set(range(length))

    def test_follows_from_seed_and_epoch(self):
        def order(seed: int, epoch: int) -> tuple[int, ...]:
            sampler = EpochSampler(range(100), seed=seed)
            sampler.set_epoch(epoch)
            return tuple(sampler)

        assert order(3, 5) == order(3, 5)
        assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9  # 0 + 1 is not 1 + 0

    @SHUFFLES
    @pytest.mark.parametrize("seed", [0, 3, 2**31 - 1, 2**32 + 5])
    def test_every_pass_has_an_order_of_its_own(self, shuffle, seed):
        def order(epoch: int, pass_number: int) -> tuple[object, ...]:
            sampler = shuffle(range(100), seed=seed)
            sampler.set_epoch(epoch)
            sampler.pass_number = pass_number
            return tuple(sampler)

        places = [(epoch, number) for epoch in range(4) for number in range(4)]
        assert len({order(*place) for place in places}) == 16
        assert [order(*place) for place in places] == [order(*place) for place in places]

    @pytest.mark.parametrize("seed", [0, 3, 2**32 + 5])
    @pytest.mark.parametrize("epoch", [0, 1, 7])
    def test_the_first_pass_is_that_of_former_versions(self, seed, epoch):
        """Otherwise a training would not resume their checkpoints in the same order."""
        sampler = SeededSampler(range(100), seed=seed)
        sampler.set_epoch(epoch)
        images, seeds = zip(*sampler, strict=True)
        assert list(images) == np.random.default_rng((seed, epoch)).permutation(100).tolist()
        drawn = np.random.default_rng((seed, epoch, 1)).integers(2**63, size=100)
        assert list(seeds) == drawn[list(images)].tolist()

    def test_seeds_belong_to_images_and_not_to_places(self):
        alone = dict(SeededSampler(range(50), seed=4))
        halves = [dict(SeededSampler(range(50), 2, rank, seed=4)) for rank in (0, 1)]
        assert halves[0] | halves[1] == alone
        assert len(set(alone.values())) == 50
        later = SeededSampler(range(50), seed=4)
        later.set_epoch(1)
        assert not set(dict(later).values()) & set(alone.values())


class TestBlockSampler:
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
