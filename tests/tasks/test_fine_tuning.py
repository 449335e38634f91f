"""Lightning's BackboneFinetuning with our tasks: frozen, unfrozen, resumed, in several processes, from YAML."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_znorm import ZNormCallback
from lightning_znorm.data import LGGDataModule
from lightning_znorm.errors import ZNormAttributeError
from lightning_znorm.models import resnet20
from lightning_znorm.tasks import ClassificationTask, SegmentationTask, fine_tuning
from lightning_znorm.tasks.fine_tuning import encoder_of
from lightning_znorm.tasks.networks import create_classifier
from tests.distributed import run_distributed
from tests.tasks.ddp_fine_tuning import Network, encoders_after, loader, task
from tests.trainers import trainer

CONVOLUTION = "model.encoder.0.weight"


class Watch(Callback):
    """Keeps the weights and the learning rates at the start of each epoch, and the encoder's gradients of each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.gradients: list[Tensor | None] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.weights.append(copy.deepcopy(pl_module.state_dict()))
            self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        gradient = dict(pl_module.named_parameters())[CONVOLUTION].grad
        self.gradients.append(None if gradient is None else gradient.clone())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(copy.deepcopy(pl_module.state_dict()))


def finetuning(epoch: int, **kwargs: Any) -> BackboneFinetuning:
    return BackboneFinetuning(epoch, train_bn=False, **kwargs)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


class TestBackbone:
    def test_encoder(self) -> None:
        ours = task()
        assert ours.backbone is ours.model.encoder
        assert not any("backbone" in name for name in ours.state_dict())
        assert [name for name, _ in ours.named_children()].count("backbone") == 0
        assert len(list(ours.parameters())) == len(list(ours.model.parameters()))

    def test_of_monai(self) -> None:
        from monai.networks.nets import FlexibleUNet

        network = FlexibleUNet(3, 1, "efficientnet-b0", decoder_channels=(8, 8, 4, 4, 4))
        assert encoder_of(network) is network.encoder

    @pytest.mark.parametrize(
        "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "deit_tiny_distilled_patch16_224"]
    )
    def test_of_a_classifier(self, name: str) -> None:
        network = create_classifier(name, num_classes=3)
        found = network.get_classifier()
        last = {id(p) for layer in (found if isinstance(found, tuple) else (found,)) for p in layer.parameters()}
        backbone = encoder_of(network)
        assert {id(p) for p in backbone.parameters()} == {id(p) for p in network.parameters()} - last
        BaseFinetuning.freeze(backbone, train_bn=False)
        assert {id(p) for p in network.parameters() if p.requires_grad} == last

    def test_of_our_own_classifier(self) -> None:
        network = resnet20()
        expected = {id(p) for name, p in network.named_parameters() if not name.startswith("fc.")}
        assert {id(p) for p in encoder_of(network).parameters()} == expected
        assert not any("backbone" in name for name in ClassificationTask(network, num_classes=10).state_dict())

    def test_none(self) -> None:
        ours = SegmentationTask(nn.Conv2d(3, 1, 1))
        assert not hasattr(ours, "backbone")
        assert getattr(ours, "backbone", None) is None
        with pytest.raises(ZNormAttributeError, match=r"^Conv2d has no part .*encoder, backbone; .*get_classifier\(\)"):
            _ = ours.backbone
        with pytest.raises(ZNormAttributeError, match="Conv2d has no part"):
            trainer(callbacks=[BackboneFinetuning()]).fit(ours, loader(), loader())

    def test_other_missing_attributes(self) -> None:
        with pytest.raises(AttributeError, match="'SegmentationTask' object has no attribute 'backbones'"):
            _ = task().backbones

    def test_a_subclass_has_its_own(self) -> None:
        class Own(SegmentationTask):
            def __init__(self) -> None:
                super().__init__(Network())
                self.backbone = self.model.decoder

        own = Own()
        assert own.backbone is own.model.decoder
        copied = copy.deepcopy(own)
        assert copied.backbone is copied.model.decoder


class TestTraining:
    # An error of Lightning: frozen parameters would already be in the optimizer, or rates would be set for all.
    @pytest.mark.parametrize("methods", [[], [ZNormCallback()]], ids=["plain", "znorm"])
    def test_frozen_until_the_epoch(self, methods: list[Callback]) -> None:
        watch = Watch()
        callbacks = [finetuning(2), *methods, watch]  # a warning would be an error
        trainer(max_epochs=4, callbacks=callbacks, limit_val_batches=0).fit(task(), loader(4), loader(4))
        first, second, third, fourth, end = watch.weights
        frozen = {CONVOLUTION}
        assert changed(first, third).isdisjoint(frozen)
        assert "model.decoder.weight" in changed(first, second)
        assert frozen <= changed(third, fourth)
        assert frozen <= changed(fourth, end)
        # Lightning leaves batch normalization in training.
        assert {"model.encoder.1.weight", "model.encoder.1.running_mean"} <= changed(first, second)
        assert watch.rates == [[0.1], [0.1], pytest.approx([0.1, 0.01]), pytest.approx([0.1, 0.02])]
        assert watch.gradients[:4] == [None] * 4
        for gradient in watch.gradients[4:]:
            is_normalized = abs(float(gradient.mean())) < 1e-6 and abs(float(gradient.std(correction=0)) - 1) < 1e-3
            assert is_normalized == bool(methods)

    def test_as_a_loop_by_hand(self) -> None:
        watch = Watch()
        trainer(max_epochs=3, callbacks=[finetuning(1), watch], limit_val_batches=0).fit(task(), loader(), loader())
        ours = task().train()
        parts = [p for name, p in ours.named_parameters() if not name.startswith("model.encoder.0")]
        optimizer = torch.optim.SGD(parts, lr=0.1, momentum=0.9)
        for epoch, rate in enumerate([None, 0.01, 0.02]):
            if epoch == 1:
                optimizer.add_param_group({"params": list(ours.model.encoder[0].parameters())})
            if rate is not None:
                optimizer.param_groups[1]["lr"] = rate
            for images, masks in loader():
                optimizer.zero_grad()
                ours.criterion(ours(images), masks).backward()
                optimizer.step()
        weights = ours.state_dict()
        assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in watch.weights[-1].items())

    def test_without_the_callback_nothing_changes(self) -> None:
        ours = task()
        ours.model.encoder.requires_grad_(False)
        optimizer = ours.configure_optimizers()
        assert isinstance(optimizer, torch.optim.SGD)
        assert len(optimizer.param_groups[0]["params"]) == len(list(ours.parameters()))

    def test_everything_frozen(self) -> None:
        class All(BaseFinetuning):
            def freeze_before_training(self, pl_module: LightningModule) -> None:
                self.freeze(pl_module, train_bn=False)

            def finetune_function(self, *args: Any) -> None: ...

        with pytest.raises(ValueError, match=r"^All has frozen all parameters"):
            trainer(callbacks=[All()]).fit(task(), loader(), loader())

    @pytest.mark.parametrize(
        ("scheduler", "works"),
        [
            (partial(lr_scheduler.MultiStepLR, milestones=[2]), True),
            (partial(lr_scheduler.CosineAnnealingLR, T_max=4), True),
            (partial(lr_scheduler.ReduceLROnPlateau, patience=0), True),
            (partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 0.9**epoch), False),
            (partial(lr_scheduler.OneCycleLR, max_lr=0.1), False),
        ],
        ids=["MultiStepLR", "CosineAnnealingLR", "ReduceLROnPlateau", "LambdaLR", "OneCycleLR"],
    )
    def test_schedulers(self, scheduler: Any, works: bool) -> None:
        watch = Watch()
        made = trainer(max_epochs=3, callbacks=[finetuning(1), watch])
        ours = task(lr_scheduler=scheduler)
        if works:
            made.fit(ours, loader(), loader())
            assert len(watch.rates[-1]) == 2
            return
        name = scheduler.func.__name__
        with pytest.raises(
            ValueError, match=rf"^{name} would end this training .*epoch .* BackboneFinetuning .*StepLR"
        ):
            made.fit(ours, loader(), loader())
        assert not watch.weights


class Random(Network):
    """A network that draws random numbers in training."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.2, self.training))


class ThawsByHand(BaseFinetuning):
    """A user's callback that freezes batch normalization too."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.model.encoder, train_bn=False)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.model.encoder, optimizer, lr=0.01)


class TestResumed:
    """Unfrozen at epoch 2 of 5. Each epoch has 4 steps."""

    @pytest.fixture(autouse=True)
    def _data(self, fake_lgg: Path) -> None:
        self.root = fake_lgg

    def fit(
        self, callback: Callback, folder: Path, ckpt: Path | None = None, unfrozen: bool = True, **saving: Any
    ) -> dict[str, Tensor]:
        torch.manual_seed(0)
        ours = SegmentationTask(
            Random(),
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
            lr_scheduler=partial(lr_scheduler.ExponentialLR, gamma=0.9),
        )
        torch.manual_seed(0 if ckpt is None else 77)
        data = LGGDataModule(self.root, batch_size=3, val_fraction=0.2, test_fraction=0.2)
        saves = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **(saving or {"every_n_train_steps": 2}))
        trainer(
            max_epochs=5,
            enable_checkpointing=True,
            callbacks=[callback, ZNormCallback(), saves],
        ).fit(ours, datamodule=data, ckpt_path=ckpt)
        assert all(parameter.requires_grad for parameter in ours.parameters()) == unfrozen
        return ours.state_dict()

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    @pytest.mark.parametrize("make", [partial(finetuning, 2), ThawsByHand], ids=["BackboneFinetuning", "own"])
    def test_ends_with_the_same_weights(self, make: Any, tmp_path: Path) -> None:
        expected = self.fit(make(), tmp_path / "whole")
        steps = sorted(int(path.stem.removeprefix("step=")) for path in (tmp_path / "whole").iterdir())
        assert steps == list(range(2, 21, 2))
        # Before the epoch, at its start, in the middle of it, at its end, and later.
        for step in (4, 6, 8, 10, 12, 16, 18):
            ends = self.fit(make(), tmp_path / f"from {step}", tmp_path / f"whole/step={step}.ckpt")
            assert changed(expected, ends) == set(), step
        # Lightning alone would go on with a frozen encoder.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fine_tuning, "resume", lambda *_: None)
            ends = self.fit(make(), tmp_path / "unmended", tmp_path / "whole/step=12.ckpt", unfrozen=False)
            assert CONVOLUTION in changed(expected, ends)

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    @pytest.mark.parametrize("at_train_epoch_end", [True, False])
    def test_from_the_end_of_an_epoch(self, at_train_epoch_end: bool, tmp_path: Path) -> None:
        when = {"save_on_train_epoch_end": at_train_epoch_end}
        expected = self.fit(finetuning(2), tmp_path / "whole", **when)
        for step in (4, 8, 12, 16):
            ends = self.fit(finetuning(2), tmp_path / f"from {step}", tmp_path / f"whole/step={step}.ckpt", **when)
            assert changed(expected, ends) == set(), step

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_epoch_missed(self, tmp_path: Path) -> None:
        self.fit(finetuning(3), tmp_path / "whole")
        with pytest.raises(ValueError, match=r"^BackboneFinetuning unfreezes the encoder at epoch 1, .* to 2 or more"):
            self.fit(finetuning(1), tmp_path / "again", tmp_path / "whole/step=10.ckpt")


class TestSeveralProcesses:
    def test_encoders_would_part(self) -> None:
        """Why it is refused: also DDP's search for unused parameters does not average what was frozen."""
        for find_unused in (False, True):
            first, second = run_distributed(encoders_after, 1, False, find_unused)
            assert first != second

    def test_refused(self) -> None:
        for message in run_distributed(encoders_after, 1, True):
            assert message.startswith(
                "BackboneFinetuning unfreezes the encoder at epoch 1, and this training has 2 proc"
            )
            assert "Trainer(devices=1)" in message

    def test_own_callback_is_refused_when_it_unfreezes(self) -> None:
        for message in run_distributed(encoders_after, 1, True, False, True):
            assert message.startswith("OwnFinetuning has unfrozen model.encoder.0.weight in a training of 2 processes")

    def test_frozen_for_good(self) -> None:
        first, second = run_distributed(encoders_after, 2, True)
        assert first == second == task().model.encoder[0].weight.flatten().tolist()
