"""Learning rate schedules, from YAML too: their length, how often they step, and what they follow."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, PolynomialLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_znorm.cli import main
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from tests.trainers import trainer

CONFIGS = Path(__file__).parents[2] / "configs"
sgd = partial(torch.optim.SGD, lr=0.1)
one_cycle = partial(OneCycleLR, max_lr=0.5)
# Of one cycle: max_lr / div_factor, and that / final_div_factor.
FIRST, LAST = 0.5 / 25, 0.5 / 25 / 1e4


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def task(**kwargs: Any) -> ClassificationTask:
    return ClassificationTask(nn.Linear(4, 3), num_classes=3, **{"optimizer": sgd, **kwargs})


def data(batches: int = 6) -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(2 * batches, 4), torch.arange(2 * batches) % 3), batch_size=2)


def rates(make: Any, loader: Any = None, interval: Any = "epoch", **kwargs: Any) -> list[float]:
    """The learning rates of a training."""
    watch = Rates()
    loader = data() if loader is None else loader
    kwargs = {"max_epochs": 2, "limit_val_batches": 0, **kwargs}
    callbacks = [watch, *kwargs.pop("callbacks", [])]
    run = trainer(callbacks=callbacks, **kwargs)
    run.fit(task(lr_scheduler=make, lr_scheduler_interval=interval), loader, data())
    return watch.seen


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(4), torch.tensor(1)


class Falling(LRScheduler):
    """A scheduler of the user's own that counts steps."""

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None) -> None:
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        assert self.total_steps is not None
        return [lr * (1 - self.last_epoch / self.total_steps) for lr in self.base_lrs]


def falling(optimizer: Optimizer, total_steps: int | None = None) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 - step / total_steps)


class TestLength:
    @pytest.mark.parametrize(
        ("kwargs", "steps"),
        [
            ({}, 12),
            ({"accumulate_grad_batches": 2}, 6),
            ({"accumulate_grad_batches": 4}, 4),  # of 4 and of the 2 that are left over
            ({"limit_train_batches": 5}, 10),
            ({"limit_train_batches": 0.5, "accumulate_grad_batches": 2}, 4),
            ({"limit_train_batches": 5, "accumulate_grad_batches": 2, "max_epochs": 3}, 9),
            ({"max_steps": 7}, 7),
            ({"max_epochs": -1, "max_steps": 9}, 9),
            ({"overfit_batches": 3}, 6),
        ],
        ids=str,
    )
    # Lightning's, of training batches that are not shuffled.
    @pytest.mark.filterwarnings("ignore:You requested to overfit but enabled training dataloader shuffling")
    def test_one_cycle_ends_with_the_training(self, kwargs: dict[str, Any], steps: int):
        seen = rates(one_cycle, **kwargs)
        assert len(seen) == steps
        assert seen[0] == pytest.approx(FIRST)
        assert seen[-1] == pytest.approx(LAST)
        expected = OneCycleLR(sgd([nn.Parameter(torch.zeros(1))]), max_lr=0.5, total_steps=steps)
        for lr in seen:
            assert lr == pytest.approx(expected.get_last_lr()[0])
            expected.optimizer.step()
            expected.step()

    def test_one_step(self):
        assert len(rates(one_cycle, fast_dev_run=True)) == 1

    @pytest.mark.parametrize(
        "make", [Falling, falling, partial(Falling), lambda o, total_steps: falling(o, total_steps)]
    )
    def test_any_other_that_counts_steps(self, make: Callable):
        assert rates(make) == pytest.approx([0.1 * (1 - step / 12) for step in range(12)])

    def test_of_the_loader_s_length_where_it_has_none(self):
        loader = DataLoader(Endless(), batch_size=2)
        assert rates(one_cycle, loader, max_steps=5)[-1] == pytest.approx(LAST)
        assert rates(one_cycle, loader, limit_train_batches=3)[-1] == pytest.approx(LAST)

    @pytest.mark.parametrize("interval", ["step", "epoch"])
    # Lightning's, of a cycle that steps by epochs, as it was told to.
    @pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
    @pytest.mark.parametrize("given", [{"total_steps": 20}, {"epochs": 4, "steps_per_epoch": 5}], ids=str)
    def test_what_was_given_is_kept(self, given: dict[str, int], interval: str):
        seen = rates(partial(one_cycle, **given), interval=interval)
        expected = OneCycleLR(sgd([nn.Parameter(torch.zeros(1))]), max_lr=0.5, total_steps=20)
        for lr in seen[:: 1 if interval == "step" else 6]:
            assert lr == pytest.approx(expected.get_last_lr()[0])
            expected.optimizer.step()
            expected.step()

    # Lightning's, of a cycle that is stepped by epochs.
    @pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
    @pytest.mark.parametrize(
        ("total_steps", "interval", "kwargs", "said"),
        [
            (11, "step", {}, "has total_steps=11, and this training steps it up to 12 times,"),
            (
                3,
                "step",
                {"accumulate_grad_batches": 3},
                "has total_steps=3, and this training steps it up to 4 times,",
            ),
            (1, "epoch", {}, "has total_steps=1, and this training steps it up to 2 times,"),
        ],
    )
    def test_a_cycle_that_is_too_short_is_said(self, total_steps: int, interval: str, kwargs: dict, said: str):
        """Torch fails at the step after the cycle, which may be hours later."""
        with pytest.warns(UserWarning, match=f"^OneCycleLR {said}"), pytest.raises(ValueError, match="Tried to step"):
            rates(partial(one_cycle, total_steps=total_steps), interval=interval, **kwargs)

    # Lightning's, of a cycle that is stepped by epochs.
    @pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
    @pytest.mark.parametrize(
        ("total_steps", "interval", "kwargs"),
        [(12, "step", {}), (4, "step", {"accumulate_grad_batches": 3}), (2, "epoch", {})],
    )
    def test_a_cycle_that_is_as_long_is_not(self, total_steps: int, interval: str, kwargs: dict):
        assert rates(partial(one_cycle, total_steps=total_steps), interval=interval, **kwargs)

    def test_other_schedules_are_left_alone(self):
        assert rates(partial(PolynomialLR, total_iters=2), interval="epoch") == pytest.approx([0.1] * 6 + [0.05] * 6)

    def test_half_of_what_replaces_it_is_torch_s_to_refuse(self):
        with pytest.raises(ValueError, match="You must define either total_steps OR"):
            rates(partial(one_cycle, epochs=3))

    @pytest.mark.parametrize(
        ("kwargs", "loader"),
        [({"max_epochs": -1}, None), ({"max_epochs": 3}, DataLoader(Endless(), batch_size=2))],
        ids=["epochs", "loader"],
    )
    def test_a_training_without_an_end_is_refused(self, kwargs: dict[str, Any], loader: DataLoader | None):
        with pytest.raises(
            ValueError, match="OneCycleLR leaves total_steps open, and this training has no end: set max"
        ):
            rates(one_cycle, loader, **kwargs)

    def test_accumulation_that_changes_is_refused(self):
        callbacks = [GradientAccumulationScheduler({0: 1, 1: 2})]
        with pytest.raises(
            ValueError, match="GradientAccumulationScheduler changes how many batches make a step: give"
        ):
            rates(one_cycle, callbacks=callbacks)
        assert len(rates(one_cycle, callbacks=[GradientAccumulationScheduler({0: 1})])) == 12

    def test_a_frequency_is_refused(self):
        steps = task(lr_scheduler=one_cycle, lr_scheduler_frequency=2)
        with pytest.raises(ValueError, match="OneCycleLR leaves total_steps open, and with lr_scheduler_frequency=2 "):
            trainer().fit(steps, data(), data())

    def test_without_a_trainer_it_is_refused(self):
        with pytest.raises(ValueError, match="OneCycleLR leaves total_steps open, and no Trainer says"):
            task(lr_scheduler=one_cycle).configure_optimizers()

    # Lightning's, of a loader that cannot say where it is.
    @pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
    @pytest.mark.parametrize("save", ["in an epoch", "after an epoch"])
    def test_resumed(self, tmp_path: Path, save: str):
        class Stop(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 8:
                    trainer.save_checkpoint(tmp_path / "in an epoch")

            def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
                if trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "after an epoch")

        whole = rates(one_cycle, callbacks=[Stop()])
        watch = Rates()
        run = trainer(max_epochs=2, limit_val_batches=0, callbacks=[watch])
        run.fit(task(lr_scheduler=one_cycle), data(), data(), ckpt_path=tmp_path / save)
        assert watch.seen == pytest.approx(whole[-len(watch.seen) :])
        assert len(watch.seen) == (4 if save == "in an epoch" else 6)

    def test_resumed_in_the_order_of_the_images_where_a_strategy_restores_late(self, tmp_path: Path):
        """FSDP, tensor parallel and DeepSpeed strategies restore after the schedule has counted the batches."""

        class Late(SingleDeviceStrategy):
            restore_checkpoint_after_setup = True

        def weights(checkpoint: Path | None, **kwargs: Any) -> Tensor:
            torch.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
            run = trainer(
                max_epochs=2,
                limit_val_batches=0,
                strategy=Late(torch.device("cpu")),
                **kwargs,
            )
            steps = ClassificationTask(network, 10, optimizer=sgd, lr_scheduler=one_cycle)
            torch.manual_seed(1 if checkpoint is None else 2)
            run.fit(steps, datamodule=DigitsDataModule(batch_size=256), ckpt_path=checkpoint)
            return network[1].weight

        class Save(Callback):
            def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

        whole = weights(None, callbacks=[Save()])
        torch.testing.assert_close(weights(tmp_path / "0.ckpt"), whole, rtol=0, atol=0)

    def test_resumed_for_longer_is_refused_before_the_first_step(self, tmp_path: Path):
        first = trainer(max_epochs=1, limit_val_batches=0)
        first.fit(task(lr_scheduler=one_cycle), data(), data())
        first.save_checkpoint(tmp_path / "last.ckpt")
        watch = Rates()
        second = trainer(max_epochs=2, limit_val_batches=0, callbacks=[watch])
        with pytest.raises(
            ValueError, match="OneCycleLR of the checkpoint ends after 6 steps, and this training has 12"
        ):
            second.fit(task(lr_scheduler=one_cycle), data(), data(), ckpt_path=tmp_path / "last.ckpt")
        assert watch.seen == []


class Loss(nn.Module):
    """Grows, so that a plateau scheduler has something to do at each of its steps."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.mean() * 0 + 1


class Plateau:
    def rates(self, make: Any, max_epochs: int = 4, frequency: int | None = None, **kwargs: Any) -> list[float]:
        """The learning rate of each epoch."""
        watch = Rates()
        strict = kwargs.pop("strict", True)
        run = trainer(max_epochs=max_epochs, callbacks=[watch], num_sanity_val_steps=0, **kwargs)
        steps = task(lr_scheduler=make, lr_scheduler_frequency=frequency, lr_scheduler_strict=strict)
        steps.criterion = Loss()
        run.fit(steps, data(1), data(1))
        return watch.seen


class TestPlateau(Plateau):
    halve = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0)
    of_train = partial(ReduceLROnPlateau, monitor="train/loss", factor=0.5, patience=0)

    @pytest.mark.parametrize("frequency", [None, 2])
    def test_validation_every_second_epoch(self, frequency: int | None):
        # The first step only notes how good it is.
        seen = self.rates(self.halve, max_epochs=6, frequency=frequency, check_val_every_n_epoch=2)
        assert seen == pytest.approx([0.1] * 4 + [0.05] * 2)

    def test_every_epoch(self):
        assert self.rates(self.halve) == pytest.approx([0.1, 0.1, 0.05, 0.025])

    def test_a_metric_of_training_is_there_in_every_epoch(self):
        assert self.rates(self.of_train, check_val_every_n_epoch=2) == pytest.approx([0.1, 0.1, 0.05, 0.025])

    def test_as_often_as_said(self):
        assert self.rates(self.of_train, frequency=3, max_epochs=8) == pytest.approx([0.1] * 6 + [0.05] * 2)

    def test_of_steps(self):
        assert rates(partial(torch.optim.lr_scheduler.StepLR, step_size=1), interval="step")[2] == pytest.approx(1e-3)
        watch = Rates()
        steps = task(
            lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1),
            lr_scheduler_interval="step",
            lr_scheduler_frequency=3,
        )
        trainer(callbacks=[watch]).fit(steps, data(), data())
        assert watch.seen == pytest.approx([0.1] * 3 + [0.01] * 3)

    def test_a_metric_that_is_not_there(self):
        with pytest.raises(
            MisconfigurationException, match="ReduceLROnPlateau conditioned on metric val/loss which is"
        ):
            self.rates(self.halve, frequency=1, check_val_every_n_epoch=2)
        with pytest.warns(RuntimeWarning, match="not available but strict is set to `False`"):
            seen = self.rates(self.halve, frequency=1, strict=False, check_val_every_n_epoch=2, max_epochs=2)
        assert seen == pytest.approx([0.1, 0.1])

    def test_of_a_segmentation(self):
        kwargs = {"lr_scheduler": self.halve, "lr_scheduler_frequency": 3, "lr_scheduler_strict": False}
        made = SegmentationTask(nn.Conv2d(3, 1, 1), **kwargs).configure_optimizers()["lr_scheduler"]
        assert (made["frequency"], made["strict"]) == (3, False)


class TestCommandLine:
    """The newcomer's experiment, in few batches, with a file laid over it."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)

    def fit(self, scheduler: dict[str, Any], trainer: dict[str, Any], **model: Any) -> dict[str, Any]:
        """Train, and return what the last checkpoint holds."""
        settings = {
            "model": {"init_args": {"model": "resnet20", "lr_scheduler": scheduler, **model}},
            "data": {"init_args": {"batch_size": 16}},
            "trainer": {
                "limit_train_batches": 3,
                "limit_val_batches": 1,
                "log_every_n_steps": 1,
                **trainer,
                "accelerator": "cpu",
            },
        }
        Path("mine.yaml").write_text(yaml.safe_dump(settings))
        main(["fit", "--config", str(CONFIGS / "digits/resnet20.yaml"), "--config", "mine.yaml"])
        (last,) = Path("logs").rglob("last.ckpt")
        return torch.load(last, weights_only=True)

    def test_one_cycle(self):
        made = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.5}}
        checkpoint = self.fit(made, {"max_epochs": 2, "accumulate_grad_batches": 2})
        assert checkpoint["lr_schedulers"][0]["total_steps"] == 4
        assert checkpoint["lr_schedulers"][0]["_step_count"] == 5
        assert checkpoint["hyper_parameters"]["lr_scheduler"]["class_path"] == made["class_path"]

    def test_one_cycle_without_an_end(self):
        made = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.5}}
        with pytest.raises(SystemExit, match="error: OneCycleLR leaves total_steps open, and this training has no end"):
            self.fit(made, {"max_epochs": -1})

    def test_plateau_with_a_validation_every_second_epoch(self):
        made = {
            "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
            "init_args": {"monitor": "val/accuracy", "mode": "max", "threshold": 1e9, "patience": 0},
        }
        settings = {"max_epochs": 2, "check_val_every_n_epoch": 2}
        checkpoint = self.fit(made, settings, lr_scheduler_frequency=2, lr_scheduler_strict=False)
        found = checkpoint["hyper_parameters"]
        assert (found["lr_scheduler_frequency"], found["lr_scheduler_strict"]) == (2, False)
