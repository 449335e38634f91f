"""Resuming in the middle of an epoch, without and with a Trainer."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from numbered import NumberedDataModule, Recorder
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from lightning_znorm.data.datasets import InMemoryImages
from lightning_znorm.data.loader import ResumableLoader
from lightning_znorm.data.samplers import EpochSampler
from tests.trainers import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Counted(InMemoryImages):
    """Images of one pixel, which is their number. Records which were read."""

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
        sampler=EpochSampler(data, num_replicas=processes, seed=1),
        collate_fn=torch.utils.data.default_convert,
        **kwargs,
    )


def labels(batches) -> list[list[int]]:
    return [batch[1].tolist() for batch in batches]


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
        """Lightning does so, and workers would have begun to read."""
        late, early = loader(Counted(), num_workers=1), loader(Counted())
        batches = iter(late)
        late.sampler.set_epoch(3)
        early.sampler.set_epoch(3)
        assert labels(batches) == labels(early)

    def test_orders_change_without_a_trainer(self):
        alone = loader(Counted())
        first, second, third = labels(alone), labels(alone), labels(alone)
        assert first != second != third != first

    def test_orders_change_where_epochs_are_counted_but_not_passes(self):
        """Lightning's loop, or another that calls ``set_epoch``, may cycle a loader within an epoch."""
        cycled, orders = loader(Counted()), []
        for epoch in range(3):
            cycled.sampler.set_epoch(epoch)
            orders += [labels(cycled) for _ in range(3)]
        assert all(orders.count(order) == 1 for order in orders)
        for epoch in range(3):
            plain = loader(Counted())
            plain.sampler.set_epoch(epoch)
            assert labels(plain) == orders[3 * epoch]

    def test_a_place_in_a_later_pass(self):
        whole = loader(Counted())
        whole.sampler.set_epoch(2)
        labels(whole)
        batches = iter(whole)
        for _ in range(3):
            next(batches)
        place, rest = whole.state_dict(), labels(batches)
        assert (place["epoch"], place["pass"], place["batches"]) == (2, 1, 3)
        resumed = loader(Counted())
        resumed.load_state_dict(place)
        resumed.sampler.set_epoch(2)
        assert labels(resumed) == rest
        assert labels(resumed) == labels(whole)  # the third pass

    def test_a_place_of_a_former_version(self):
        whole = loader(Counted())
        whole.sampler.set_epoch(2)
        batches = iter(whole)
        next(batches)
        place = whole.state_dict()
        del place["pass"]
        resumed = loader(Counted())
        resumed.load_state_dict(place)
        resumed.sampler.set_epoch(2)
        assert labels(resumed) == labels(batches)

    def test_a_place_that_nothing_was_read_from(self):
        """A checkpoint may be written right after another was loaded."""
        whole = loader(Counted())
        batches = iter(whole)
        next(batches)
        resumed = loader(Counted())
        resumed.load_state_dict(whole.state_dict())
        again = loader(Counted())
        again.load_state_dict(resumed.state_dict())
        assert labels(again) == labels(batches)

    @pytest.mark.parametrize(
        ("change", "said"), [({"batch_size": 4}, "batch_size was 3"), ({"processes": 2}, "and is 2")]
    )
    def test_other_batches(self, change, said):
        whole = loader(Counted())
        next(iter(whole))
        other = loader(Counted(), **change)
        other.load_state_dict(whole.state_dict())
        other.sampler.set_epoch(0)
        with pytest.raises(ValueError, match=f"after 1 batches, and the batches have changed .*{said}"):
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
        """Train on 80 images in batches of 16, five steps an epoch; the eighth step fails."""

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
        """Otherwise random numbers would depend on how many iterators were made."""
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


class Stream(IterableDataset):
    """A dataset of unknown length, for which Lightning fetches a batch ahead."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self):
        return iter(torch.arange(float(self.length)))


class Pairs(NumberedDataModule):
    """Gives the training images in five batches, beside another loader: by default the same in twelve batches."""

    def __init__(self, other: Iterable | None = None, mode: str = "max_size_cycle", num_workers: int = 0) -> None:
        super().__init__()
        self.other = other
        self.mode = mode
        self.num_workers = num_workers

    def train_dataloader(self) -> CombinedLoader:
        own, other = super().train_dataloader(), self.other
        if other is None:
            self.batch_size = 7
            other = super().train_dataloader()
            self.batch_size = 16
        return CombinedLoader({"other": other, "own": own}, self.mode)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not isinstance(batch, dict):
            return super().on_after_batch_transfer(batch, dataloader_idx)
        return {
            name: self.numbers(self.normalized(part[0])) if isinstance(part, list | tuple) else part
            for name, part in batch.items()
        }


class PairsModule(Recorder):
    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.layer(torch.ones(2)).sum()


class Peeks(Callback):
    """Reads the first batch of the loader, as callbacks that draw images do."""

    def __init__(self) -> None:
        self.looks = 0

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        next(iter(trainer.train_dataloader["own"]))
        self.looks += 1

    on_train_epoch_start = on_train_start

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        if not trainer.sanity_checking:
            self.on_train_start(trainer)
            self.on_train_start(trainer)


def own(batches: list[dict]) -> list[list[int] | None]:
    return [batch["own"] for batch in batches]


def train_beside(folder: Path, data: Pairs, *callbacks: Callback, at: int = -1, every: int | None = None, **options):
    """Return the batches of two epochs, or those before a failure."""
    checkpoint = ModelCheckpoint(
        folder, save_top_k=-1, save_on_exception=every is None, every_n_train_steps=every or 99
    )
    module, path = PairsModule(), options.pop("ckpt_path", None)
    torch.manual_seed(0 if path is None else 1)
    run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[*callbacks, Fails(at), checkpoint], **options)
    with pytest.raises(RuntimeError, match="halfway") if at >= 0 else contextlib.nullcontext():
        run.fit(module, datamodule=data, ckpt_path=path)
    return module.seen["train"]


def resume_beside(folder: Path, make: Callable[[], Pairs], at: int, every: int | None = None, **options):
    """Return the batches up to a failure, and those after resuming from the checkpoint."""
    before = train_beside(folder, make(), at=at, every=every, **options)
    (path,) = [path for path in folder.iterdir() if path.stem.endswith(f"step={at}")]
    return before[:at] + train_beside(folder, make(), ckpt_path=path, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    return train_beside(tmp_path_factory.mktemp("whole"), Pairs(range(13)))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")  # if one is plain
@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
class TestBesideAnotherLoader:
    def test_no_order_twice(self, whole):
        seen = own(whole)
        assert len(seen) == 2 * 13
        passes = [seen[0:5], seen[5:10], seen[10:13], seen[13:18], seen[18:23], seen[23:26]]
        assert all(len({number for batch in batches for number in batch}) == 16 * len(batches) for batches in passes)
        assert len({tuple(batch) for batch in seen}) == 26

    def test_first_passes_are_the_epochs_of_the_loader_alone(self, whole):
        module, data = Recorder(), NumberedDataModule()
        torch.manual_seed(0)
        trainer(max_epochs=2).fit(module, datamodule=data)
        assert own(whole[0:5] + whole[13:18]) == seen(module, data)

    @pytest.mark.parametrize("every", [None, 1], ids=["a step that fails", "between two steps"])
    @pytest.mark.parametrize("at", [4, 5, 6, 12, 13, 19])
    def test_goes_on(self, whole, tmp_path, at, every):
        assert own(resume_beside(tmp_path, lambda: Pairs(range(13)), at, every)) == own(whole)

    @pytest.mark.parametrize(
        ("mode", "at"),
        [
            ("min_size", 4),
            ("min_size", 5),
            *((f"max_size{end}", at) for end in ("", "_cycle") for at in (4, 5, 6, 11, 12)),
        ],
    )
    def test_two_own_loaders(self, tmp_path, mode, at):
        whole = train_beside(tmp_path / "whole", Pairs(mode=mode))
        assert len(whole) == 2 * (5 if mode == "min_size" else 12)
        assert (whole[5]["own"] is None) == (mode == "max_size")
        assert resume_beside(tmp_path / "half", lambda: Pairs(mode=mode), at) == whole

    @pytest.mark.parametrize("every", [None, 1], ids=["a step that fails", "between two steps"])
    @pytest.mark.parametrize("at", [3, 4, 5, 9, 18])
    def test_beside_a_stream(self, tmp_path, at, every):
        def make() -> Pairs:
            return Pairs(DataLoader(Stream(13), batch_size=None))

        whole = own(train_beside(tmp_path / "whole", make()))
        assert len(whole) == 2 * 13
        # Lightning begins the stream anew, and makes the epoch longer by what was had of it.
        end = 13 if at < 13 else 26
        assert own(resume_beside(tmp_path / "half", make, at, every))[:end] == whole[:end]

    @pytest.mark.parametrize("at", [7, 17])
    def test_loaders_that_are_made_anew(self, whole, tmp_path, at):
        options = {"reload_dataloaders_every_n_epochs": 1}
        assert train_beside(tmp_path / "whole", Pairs(range(13)), **options) == whole
        assert own(resume_beside(tmp_path / "half", lambda: Pairs(range(13)), at, **options)) == own(whole)

    def test_workers(self, whole, tmp_path):
        assert train_beside(tmp_path / "workers", Pairs(range(13), num_workers=2)) == whole
        assert own(resume_beside(tmp_path / "half", lambda: Pairs(range(13), num_workers=2), 7)) == own(whole)

    @pytest.mark.parametrize("step", [4, 8, 12, 17])
    def test_a_look_at_the_loader_changes_nothing(self, whole, tmp_path, step):
        """This holds too if the checkpoint is written right after it."""
        peeks, options = Peeks(), {"val_check_interval": 4}
        validated = ModelCheckpoint(tmp_path / "whole", "{step}", save_top_k=-1, save_on_train_epoch_end=False)
        assert train_beside(tmp_path / "whole", Pairs(range(13)), peeks, validated, **options) == whole
        assert peeks.looks == 1 + 2 + 6 * 2
        options["ckpt_path"] = tmp_path / "whole" / f"step={step}.ckpt"
        assert own(whole[:step] + train_beside(tmp_path / "whole", Pairs(range(13)), Peeks(), **options)) == own(whole)

    def test_a_loader_that_knows_no_trainer(self, whole, tmp_path):
        """A data module may be part of another one."""

        class Within(Pairs):
            def train_dataloader(self) -> CombinedLoader:
                combined = super().train_dataloader()
                combined.iterables["own"].trainer = None
                return combined

        assert train_beside(tmp_path / "within", Within(range(13))) == whole
        assert own(resume_beside(tmp_path / "half", lambda: Within(range(13)), 7, every=1)) == own(whole)
