"""Places in the middle of an epoch, without and with a Trainer."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from numbered import NumberedDataModule, Recorder
from torch.utils.data import DataLoader, SequentialSampler

from lightning_znorm.data.in_memory import InMemoryImages
from lightning_znorm.data.loader import ResumableLoader
from lightning_znorm.data.shuffle import EpochShuffle, SeededShuffle
from tests.trainers import trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Counted(InMemoryImages):
    """Of one pixel, its number; counts how many were read."""

    def __init__(self, length: int = 20) -> None:
        super().__init__(np.arange(length, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(length))
        self.read: list[int] = []

    def __getitems__(self, indices):
        self.read += indices
        return super().__getitems__(indices)


def loader(data: Counted, batch_size: int = 3, processes: int = 1, **kwargs) -> ResumableLoader:
    return ResumableLoader(
        data,
        batch_size=batch_size,
        sampler=EpochShuffle(data, num_replicas=processes, seed=1),
        collate_fn=torch.utils.data.default_convert,
        **kwargs,
    )


def labels(batches) -> list[list[int]]:
    return [batch[1].tolist() for batch in batches]


class TestEpochShuffle:
    @pytest.mark.parametrize(("length", "processes"), [(10, 1), (10, 3), (2, 4)])
    def test_processes_share_the_images(self, length, processes):
        parts = [list(EpochShuffle(range(length), processes, rank)) for rank in range(processes)]
        assert {len(part) for part in parts} == {-(-length // processes)}
        assert {index for part in parts for index in part} == set(range(length))

    def test_follows_from_seed_and_epoch(self):
        def order(seed: int, epoch: int) -> tuple[int, ...]:
            sampler = EpochShuffle(range(100), seed=seed)
            sampler.set_epoch(epoch)
            return tuple(sampler)

        assert order(3, 5) == order(3, 5)
        assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9  # 0 + 1 is not 1 + 0

    def test_seeds_belong_to_images_and_not_to_places(self):
        alone = dict(SeededShuffle(range(50), seed=4))
        halves = [dict(SeededShuffle(range(50), 2, rank, seed=4)) for rank in (0, 1)]
        assert halves[0] | halves[1] == alone
        assert len(set(alone.values())) == 50
        later = SeededShuffle(range(50), seed=4)
        later.set_epoch(1)
        assert not set(dict(later).values()) & set(alone.values())


class TestResumableLoader:
    @pytest.mark.parametrize(("done", "num_workers"), [(0, 0), (1, 0), (4, 0), (7, 0), (4, 2)])
    def test_goes_on_behind_what_was_had(self, done, num_workers):
        whole = loader(Counted())
        whole.sampler.set_epoch(2)
        batches = iter(whole)
        had = [next(batches) for _ in range(done)]
        place = whole.state_dict()
        rest = labels(batches)
        assert len(had) + len(rest) == 7

        data = Counted()
        resumed = loader(data, num_workers=num_workers)
        resumed.load_state_dict(place)
        resumed.sampler.set_epoch(2)
        assert len(resumed) == 7
        assert labels(resumed) == rest
        if not num_workers:
            assert data.read == [number for batch in rest for number in batch]  # and no other
        whole.sampler.set_epoch(3)
        resumed.sampler.set_epoch(3)
        assert labels(resumed) == labels(whole)

    def test_place_of_another_epoch(self):
        resumed = loader(Counted())
        resumed.load_state_dict({"epoch": 0, "batches": 7, "batch_size": 1, "processes": 9, "images": 1})
        resumed.sampler.set_epoch(1)
        assert len(labels(resumed)) == 7

    def test_the_epoch_may_be_named_after_the_iterator_is_made(self):
        """As Lightning does, with workers that would have begun."""
        late, early = loader(Counted(), num_workers=1), loader(Counted())
        batches = iter(late)
        late.sampler.set_epoch(3)
        early.sampler.set_epoch(3)
        assert labels(batches) == labels(early)

    def test_orders_change_without_a_trainer(self):
        alone = loader(Counted())
        first, second, third = labels(alone), labels(alone), labels(alone)
        assert first != second != third != first

    @pytest.mark.parametrize(
        ("change", "said"), [({"batch_size": 4}, "batch_size was 3"), ({"processes": 2}, "and is 2")]
    )
    def test_other_batches(self, change, said):
        whole = loader(Counted())
        next(iter(whole))
        other = loader(Counted(), **change)
        other.load_state_dict(whole.state_dict())
        other.sampler.set_epoch(0)
        with pytest.raises(ValueError, match=f"after 1 batches, and batches are others now .*{said}"):
            next(iter(other))

    def test_other_samplers(self):
        data = Counted()
        plain = ResumableLoader(data, 3, sampler=SequentialSampler(data), collate_fn=torch.utils.data.default_convert)
        assert [number for batch in labels(plain) for number in batch] == list(range(20))


class Draws(Callback):
    """Draws a random number from torch at every batch, as dropout does."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.drawn.append(float(torch.rand(())))


class Fails(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_before_optimizer_step(self, trainer, *_: object) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("halfway")


def seen(module: Recorder, data: NumberedDataModule) -> list[list[int]]:
    return [data.numbers(images) for images, _ in module.seen["train"]]


class TestInTheTrainer:
    def test_a_step_that_fails_is_taken_again(self, tmp_path):
        """80 images in batches of 16: five steps an epoch, of which the eighth fails."""

        def run(*callbacks: Callback, **fit) -> list[list[int]]:
            module, data = Recorder(), NumberedDataModule()
            checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True, every_n_epochs=9)
            run = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[*callbacks, checkpoint])
            try:
                run.fit(module, datamodule=data, **fit)
            except RuntimeError:
                return seen(module, data)
            assert len(module.seen["val"]) == 2 * 3 + 2 if not fit else 2 * 2
            return seen(module, data)

        torch.manual_seed(0)
        whole = run()
        torch.manual_seed(0)
        before = run(Fails(at=7))
        assert before == whole[:8]
        (saved,) = [path for path in tmp_path.iterdir() if "step=7" in path.name]
        assert run(ckpt_path=saved) == whole[7:]

    def test_no_number_is_drawn_from_torch_to_read(self):
        """Else random numbers would hang on how many iterators were made."""
        module, data, draws = Recorder(), NumberedDataModule(), Draws()
        torch.manual_seed(0)
        trainer(max_epochs=2, callbacks=[draws]).fit(module, datamodule=data)
        torch.manual_seed(0)
        torch.randint(2**31, ())  # the seed of the orders
        assert draws.drawn == [float(torch.rand(())) for _ in range(10)]

    def test_trainings_that_follow_have_orders_of_their_own(self):
        data, orders = NumberedDataModule(), []
        for _ in range(2):
            module = Recorder()
            trainer().fit(module, datamodule=data)
            orders.append(seen(module, data))
        assert orders[0] != orders[1]

    def test_overfit_batches_and_plain_loaders(self):
        class Plain(NumberedDataModule):
            def train_dataloader(self) -> DataLoader:
                return self.loader(self.train_set, shuffle=False)

        for data, options in ((NumberedDataModule(), {"overfit_batches": 2}), (Plain(), {})):
            module: LightningModule = Recorder()
            with pytest.warns(UserWarning, match="overfit") if options else np.errstate():
                trainer(max_epochs=2, limit_val_batches=0, **options).fit(module, datamodule=data)
            orders = seen(module, data)
            assert orders[: len(orders) // 2] == orders[len(orders) // 2 :]
