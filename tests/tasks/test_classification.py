import csv
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.data import DigitsDataModule
from lightning_znorm.tasks import ClassificationTask
from tests.distributed import run_distributed
from tests.tasks.ddp_metrics import loader, task, validate_and_train
from tests.trainers import trainer

KEYS = {"train/loss", "val/loss", "val/accuracy"}


class Digits(DigitsDataModule):
    """Few batches of the real digits."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**{"batch_size": 400, **kwargs})


def linear(width: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width))


def batches(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class TestModel:
    def test_by_name(self):
        digits = ClassificationTask("resnet20", num_classes=10, in_chans=1)
        assert digits(torch.zeros(2, 1, 8, 8)).shape == (2, 10)

    def test_by_name_with_arguments(self):
        mobile = ClassificationTask("mobilenetv2_100", num_classes=4, model_kwargs={"drop_rate": 0.5})
        assert mobile.model.drop_rate == 0.5
        assert mobile(torch.zeros(2, 3, 32, 32)).shape == (2, 4)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="resnet56"):
            ClassificationTask("resnet65", num_classes=10)

    def test_module(self):
        network = linear()
        assert ClassificationTask(network, num_classes=10).model is network

    def test_module_takes_no_arguments(self):
        with pytest.raises(ValueError, match="model_kwargs are for a model by name, and Linear is a module"):
            ClassificationTask(nn.Linear(4, 10), num_classes=10, model_kwargs={"drop_rate": 0.5})

    @pytest.mark.parametrize("name", ["num_classes", "in_chans"])
    def test_arguments_of_the_task_are_not_given_twice(self, name):
        with pytest.raises(ValueError, match=f"^model_kwargs must not hold {name}: set {name} of ClassificationTask"):
            ClassificationTask("resnet20", num_classes=10, model_kwargs={name: 3})

    @pytest.mark.parametrize("made", [None, torch.optim.SGD(linear().parameters(), lr=0.1)], ids=["None", "made"])
    def test_what_makes_no_optimizer(self, made):
        with pytest.raises(
            TypeError, match=r"^optimizer must be a function that makes one .* got (None|an object of SGD)\.$"
        ):
            ClassificationTask(linear(), num_classes=10, optimizer=made)

    def test_what_makes_no_scheduler(self):
        made = torch.optim.lr_scheduler.StepLR(sgd(linear().parameters()), step_size=1)
        with pytest.raises(
            TypeError, match=r"^lr_scheduler must be a function that makes one .* got an object of StepLR\.$"
        ):
            ClassificationTask(linear(), num_classes=10, lr_scheduler=made)

    @pytest.mark.parametrize(("in_chans", "channels"), [(3, 1), (1, 3)])
    def test_images_of_other_channels(self, in_chans, channels):
        task = ClassificationTask("resnet20", num_classes=10, in_chans=in_chans)
        said = rf"\(2, {channels}, 8, 8\) have {channels} channels?, and .* in_chans={in_chans}: make it {channels} "
        with pytest.raises(ValueError, match=f"^Images of shape {said}"):
            task(torch.zeros(2, channels, 8, 8))

    def test_no_channels(self):
        with pytest.raises(ValueError, match=r"^in_chans must be at least 1, got 0\.$"):
            ClassificationTask("resnet20", num_classes=10, in_chans=0)

    def test_arguments_are_plain(self):
        with pytest.raises(ValueError, match=r"model_kwargs\['act_layer'\] is the class ReLU, .* pass it as the model"):
            ClassificationTask("mobilenetv2_100", num_classes=10, model_kwargs={"act_layer": nn.ReLU})

    def test_compiled_in_place(self, monkeypatch):
        class Network(nn.Linear):
            def forward(self, images):
                logits = super().forward(images)
                return -logits if torch.compiler.is_compiling() else logits

        # The program that torch.compile captures is what counts here, and the C++ compiler takes half a minute.
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
        network, images = Network(4, 3), torch.randn(2, 4)
        plain, compiled = (ClassificationTask(network, num_classes=3, compile=compile) for compile in (False, True))
        assert list(compiled.state_dict()) == list(plain.state_dict()) == ["model.weight", "model.bias"]
        torch.testing.assert_close(compiled(images), -F.linear(images, network.weight, network.bias))

    def test_not_compiled_by_default(self, monkeypatch):
        compiled = []
        monkeypatch.setattr(nn.Module, "compile", compiled.append)
        ClassificationTask(linear(), num_classes=10)
        assert compiled == []


class TestNumbers:
    """Losses and accuracies beside their definitions."""

    torch.manual_seed(0)
    images = torch.randn(23, 4)

    def logged(self, network: nn.Module, num_classes: int, labels: torch.Tensor, stage: str) -> dict[str, float]:
        classifier = ClassificationTask(network, num_classes=num_classes)
        run = getattr(trainer(), {"val": "validate", "test": "test"}[stage])
        return run(classifier, batches(self.images, labels, batch_size=8), verbose=False)[0]  # 8, 8 and 7

    @pytest.mark.parametrize("stage", ["val", "test"])
    @pytest.mark.parametrize("num_classes", [2, 5])
    def test_multi_class(self, num_classes, stage):
        network, labels = nn.Linear(4, num_classes), torch.randint(num_classes, (23,))
        logits = network(self.images)
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        assert self.logged(network, num_classes, labels, stage) == {
            f"{stage}/loss": pytest.approx(-log_p[range(23), labels].mean().item()),
            f"{stage}/accuracy": pytest.approx((logits.argmax(1) == labels).float().mean().item()),
        }

    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_binary(self, stage):
        network, labels = nn.Linear(4, 1), torch.randint(2, (23,))
        logits = network(self.images).squeeze(1)
        p = 1 / (1 + (-logits).exp())
        assert self.logged(network, 1, labels, stage) == {
            f"{stage}/loss": pytest.approx(-torch.where(labels == 1, p, 1 - p).log().mean().item()),
            f"{stage}/accuracy": pytest.approx(((logits > 0) == labels).float().mean().item()),
        }

    def test_binary_logits_that_look_like_probabilities(self):
        class Small(nn.Module):
            def forward(self, images):
                return torch.full((len(images), 1), 0.25)  # a probability of 0.56

        assert self.logged(Small(), 1, torch.ones(23, dtype=torch.int64), "val")["val/accuracy"] == 1

    def test_training_loss_is_the_mean_over_images(self):
        network, labels = nn.Linear(4, 3), torch.randint(3, (23,))
        expected = F.cross_entropy(network(self.images), labels).item()
        run = trainer()
        frozen = ClassificationTask(network, num_classes=3, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        data = batches(self.images, labels, batch_size=8)
        run.fit(frozen, data, data)
        assert run.callback_metrics["train/loss"].item() == pytest.approx(expected)

    def test_two_processes(self):
        ranks = run_distributed(validate_and_train)
        for number in range(2):
            (alone,) = trainer().validate(task(), loader(seed=number + 1), verbose=False)
            expected = {f"{name}/dataloader_idx_{number}": value for name, value in alone.items()}
            for metrics, _ in ranks:
                assert metrics[number] == pytest.approx(expected)
        for _, steps in ranks:
            assert steps == [6, 6, 6]  # of one cycle, whose length nobody gave


class TestPrediction:
    images = torch.randn(10, 4)

    def test_multi_class(self):
        network = nn.Linear(4, 3)
        predictions = trainer().predict(
            ClassificationTask(network, num_classes=3), batches(self.images, torch.zeros(10), batch_size=6)
        )
        assert [p.shape for p in predictions] == [(6, 3), (4, 3)]
        probabilities = torch.cat(predictions)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(10))
        torch.testing.assert_close(probabilities, network(self.images).exp() / network(self.images).exp().sum(1, True))

    def test_binary(self):
        network = nn.Linear(4, 1)
        predictions = trainer().predict(
            ClassificationTask(network, num_classes=1), batches(self.images, torch.zeros(10), batch_size=6)
        )
        assert [p.shape for p in predictions] == [(6,), (4,)]
        torch.testing.assert_close(torch.cat(predictions), 1 / (1 + (-network(self.images).squeeze(1)).exp()))

    def test_images_without_labels(self):
        classifier = ClassificationTask(nn.Linear(4, 3), num_classes=3)
        (prediction,) = trainer().predict(classifier, DataLoader(self.images, batch_size=10))
        torch.testing.assert_close(prediction, classifier.predict_step([self.images]))


class TestLogging:
    def test_once_per_epoch(self, tmp_path):
        run = trainer(max_epochs=2, logger=CSVLogger(tmp_path, name="", version=""))
        run.fit(ClassificationTask(linear(), num_classes=10), datamodule=Digits())
        assert set(run.callback_metrics) == KEYS
        with open(tmp_path / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        assert set(rows[0]) == {*KEYS, "epoch", "step"}
        for key in KEYS:
            assert [row["epoch"] for row in rows if row[key]] == ["0", "1"]
        run.test(datamodule=Digits(), ckpt_path=None, model=run.lightning_module, verbose=False)
        assert set(run.callback_metrics) == {"test/loss", "test/accuracy"}

    def test_the_progress_bar_shows_ends_of_epochs(self):
        shown = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, *_):
                shown.append(set(trainer.progress_bar_metrics))

            def on_train_end(self, trainer, *_):
                shown.append(set(trainer.progress_bar_metrics))

        run = trainer(callbacks=Watch(), num_sanity_val_steps=0)
        run.fit(ClassificationTask(linear(), num_classes=10), datamodule=Digits())
        assert shown == [set(), set(), set(), set(), KEYS]


class TestOptimizer:
    def test_adam_by_default(self):
        optimizer = ClassificationTask(linear(), num_classes=10).configure_optimizers()
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.defaults["lr"] == 1e-3

    def test_any_other(self):
        classifier = ClassificationTask(linear(), num_classes=10, optimizer=sgd)
        before = [p.detach().clone() for p in classifier.parameters()]
        gradients = []

        class Watch(Callback):
            def on_before_optimizer_step(self, *_):
                gradients.extend(p.grad.clone() for p in classifier.parameters())

        trainer(max_steps=1, callbacks=Watch()).fit(classifier, datamodule=Digits())
        for p, start, gradient in zip(classifier.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p.detach(), start - 0.1 * gradient)

    def rates(self, max_epochs: int = 3, **kwargs) -> list[float]:
        """The learning rate of every step; there are four in an epoch."""
        seen = []

        class Watch(Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                seen.append(optimizer.param_groups[0]["lr"])

        run = trainer(max_epochs=max_epochs, callbacks=Watch())
        run.fit(ClassificationTask(linear(), num_classes=10, optimizer=sgd, **kwargs), datamodule=Digits())
        return seen

    def test_scheduler_steps_by_epoch(self):
        rates = self.rates(lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))
        assert rates == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 4)

    def test_scheduler_steps_by_optimizer_step(self):
        rates = self.rates(
            max_epochs=1,
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
            lr_scheduler_interval="step",
        )
        assert rates == pytest.approx([0.1, 0.01, 0.001, 0.0001])

    def test_one_cycle(self):
        rates = self.rates(
            lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=12),
            lr_scheduler_interval="step",
        )
        assert max(rates) == pytest.approx(0.3, rel=0.1)
        assert rates.index(max(rates)) in (3, 4)
        assert rates[0] < rates[1] < rates[2]
        assert rates[-1] < 1e-3

    @pytest.mark.parametrize(
        ("make", "falls"),
        [
            # Whatever the loss does, it does not grow by 1e9 of itself, and accuracy does not fall by that.
            (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "max", patience=0, threshold=1e9), True),
            (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "min", patience=0), False),
            (lambda o: ReduceLROnPlateau(o, "val/accuracy", mode="max", patience=0, threshold=1e9), True),
            (lambda o: ReduceLROnPlateau(o, "train/loss", mode="min", patience=0), False),
        ],
        ids=["val/loss no better", "val/loss better", "val/accuracy no better", "train/loss better"],
    )
    def test_plateau(self, make, falls):
        rates = self.rates(lr_scheduler=make)
        assert (rates[-1] < 0.1) == falls

    def test_the_metric_that_a_plateau_is_of(self):
        def monitor(make) -> str:
            return ClassificationTask(linear(), 10, lr_scheduler=make).configure_optimizers()["lr_scheduler"]["monitor"]

        assert monitor(lambda o: ReduceLROnPlateau(o, "val/accuracy")) == "val/accuracy"
        assert monitor(torch.optim.lr_scheduler.ReduceLROnPlateau) == "val/loss"

    def test_resumed(self, tmp_path):
        def classifier() -> ClassificationTask:
            return ClassificationTask(
                linear(), num_classes=10, optimizer=sgd, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2)
            )

        first = trainer(max_epochs=2)
        first.fit(classifier(), datamodule=Digits())
        first.save_checkpoint(tmp_path / "first.ckpt")
        second = trainer(max_epochs=3)
        second.fit(classifier(), datamodule=Digits(), ckpt_path=tmp_path / "first.ckpt")
        assert second.current_epoch == 3
        assert second.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


class TestCheckpoint:
    def saved(self, classifier: ClassificationTask, folder: Path) -> Path:
        run = trainer(max_steps=1, logger=CSVLogger(folder, name="", version=""))
        run.fit(classifier, datamodule=Digits())
        run.save_checkpoint(folder / "last.ckpt")
        return folder / "last.ckpt"

    def test_of_a_task_by_name(self, tmp_path):
        classifier = ClassificationTask("resnet20", num_classes=10, in_chans=1)
        path = self.saved(classifier, tmp_path)
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["hyper_parameters"] == {
            "model": "resnet20",
            "num_classes": 10,
            "in_chans": 1,
            "model_kwargs": None,
            "lr_scheduler": None,
            "lr_scheduler_interval": "epoch",
            "compile": False,
            "lr_scheduler_frequency": None,
            "lr_scheduler_strict": True,
            "prior": None,
            "channels_last": False,
        }
        again = ClassificationTask.load_from_checkpoint(path)
        images = torch.randn(3, 1, 8, 8)
        torch.testing.assert_close(again.eval()(images), classifier.eval()(images))

    def test_of_a_task_of_objects(self, tmp_path):
        network = linear()
        classifier = ClassificationTask(
            network,
            num_classes=10,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.25),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
        )
        path = self.saved(classifier, tmp_path)
        plain = {
            "num_classes": 10,
            "in_chans": 3,
            "model_kwargs": None,
            "lr_scheduler_interval": "epoch",
            "compile": False,
            "lr_scheduler_frequency": None,
            "lr_scheduler_strict": True,
            "prior": None,
            "channels_last": False,
        }
        assert torch.load(path, weights_only=True)["hyper_parameters"] == plain
        logged = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
        assert logged == {**plain, "batch_size": 400, "val_fraction": 0.1, "seed": 0}
        with pytest.raises(TypeError, match="'model'"):
            ClassificationTask.load_from_checkpoint(path)
        again = ClassificationTask.load_from_checkpoint(path, model=linear(), optimizer=sgd)
        torch.testing.assert_close(again.model.state_dict(), network.state_dict())
        assert again.configure_optimizers().defaults["lr"] == 0.1

    def test_of_a_task_that_the_cli_built(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["program"])
        cli = LightningCLI(
            LightningModule,
            subclass_mode_model=True,
            save_config_callback=None,
            run=False,
            args={
                "seed_everything": 0,
                "model": {
                    "class_path": "lightning_znorm.tasks.ClassificationTask",
                    "init_args": {
                        "model": {
                            "class_path": "torch.nn.Linear",
                            "init_args": {"in_features": 4, "out_features": 3},
                        },
                        "num_classes": 3,
                        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
                        "lr_scheduler": {
                            "class_path": "torch.optim.lr_scheduler.StepLR",
                            "init_args": {"step_size": 7},
                        },
                    },
                },
            },
        )
        cli.trainer.strategy.connect(cli.model)
        cli.trainer.save_checkpoint(tmp_path / "cli.ckpt", weights_only=True)
        torch.load(tmp_path / "cli.ckpt", weights_only=True)
        again = ClassificationTask.load_from_checkpoint(tmp_path / "cli.ckpt")
        torch.testing.assert_close(again.model.state_dict(), cli.model.model.state_dict())
        assert again.lr_scheduler(sgd([nn.Parameter(torch.zeros(1))])).step_size == 7
        optimizer = again.optimizer([nn.Parameter(torch.zeros(1))])
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.defaults["lr"] == 0.05


class TestMistakes:
    @pytest.mark.parametrize("num_classes", [0, -1])
    def test_no_classes(self, num_classes):
        with pytest.raises(ValueError, match=f"num_classes must be at least 1, got {num_classes}"):
            ClassificationTask("resnet20", num_classes=num_classes)

    @pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
    @pytest.mark.parametrize("num_classes", [1, 2, 9, 11])
    def test_another_count_than_the_data(self, num_classes, stage):
        steps = []
        classifier = ClassificationTask(linear(num_classes), num_classes=num_classes)
        classifier.model.register_forward_hook(lambda *_: steps.append(1))
        message = rf"Digits has 10 classes, .* num_classes={num_classes}: make it 10 \(in YAML, model.init_args.num_cl"
        with pytest.raises(ValueError, match=message):
            getattr(trainer(), stage)(classifier, datamodule=Digits())
        assert steps == []

    def test_one_logit_for_two_classes(self):
        class Odd(Digits):
            num_classes = 2

            def load(self, train):
                images, labels = super().load(train)
                return images, labels % 2

        run = trainer(max_epochs=3)
        run.fit(ClassificationTask(linear(1), num_classes=1, optimizer=sgd), datamodule=Odd())
        assert run.callback_metrics["val/accuracy"] > 0.6
        run.fit(ClassificationTask(linear(2), num_classes=2), datamodule=Odd())

    @pytest.mark.parametrize("network", [linear(9), linear(1), nn.Conv2d(1, 10, 3)])
    def test_another_width_than_the_network(self, network):
        with pytest.raises(ValueError, match=r"turned 144 images into an output of shape \(144, .* \(144, 10\)"):
            trainer().fit(ClassificationTask(network, num_classes=10), datamodule=Digits())


@pytest.mark.parametrize(
    "precision",
    ["32-true", "bf16-mixed", *(pytest.param(name, marks=pytest.mark.full) for name in ("64-true", "bf16-true"))],
)
def test_learns_the_digits_in_every_precision(precision):
    torch.manual_seed(0)
    run = trainer(max_epochs=2, precision=precision)
    classifier = ClassificationTask("resnet20", num_classes=10, in_chans=1)
    run.fit(classifier, datamodule=DigitsDataModule())
    assert run.callback_metrics["val/accuracy"] > 0.8
    probabilities = torch.cat(run.predict(classifier, datamodule=DigitsDataModule()))
    assert probabilities.shape == (360, 10)
    torch.testing.assert_close(probabilities.sum(1).double(), torch.ones(360, dtype=torch.float64), atol=0.05, rtol=0)
