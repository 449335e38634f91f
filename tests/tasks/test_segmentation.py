from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from monai.losses import TverskyLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import SegmentationTask
from lightning_znorm.tasks.networks import create_segmenter
from tests.trainers import trainer


class Given(nn.Module):
    """Answers with the logits that it was given, however the images look; a parameter scales them."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs
        self.gain = nn.Parameter(torch.ones(()))
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        first, self.seen = self.seen, self.seen + len(images)
        outputs = [self.gain * output[first : self.seen] for output in self.outputs]
        return outputs if len(outputs) > 1 else outputs[0]


def batches(masks: Tensor, batch_size: int = 4) -> DataLoader:
    images = torch.zeros(len(masks), 3, *masks.shape[2:])
    return DataLoader(TensorDataset(images, masks), batch_size=batch_size)


def blobs(count: int, channels: int = 1, size: Sequence[int] = (16, 16), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, channels, *size, generator=generator) < 0.3).float()


def logits_like(masks: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * masks - 1 + torch.randn(masks.shape, generator=generator)


def fit(task: SegmentationTask, data: DataLoader) -> Trainer:
    run = trainer()
    run.fit(task, data, data)
    return run


def training_loss(task: SegmentationTask, images: Tensor, masks: Tensor) -> Tensor:
    task.log = lambda *args, **kwargs: None  # without a Trainer there is no log
    return task.training_step((images, masks), 0)


def dice_of(preds: Tensor, target: Tensor) -> float:
    """By its definition, the mean over masks."""
    scores = [
        2 * (p & t).sum() / (p.sum() + t.sum()) for p, t in zip(preds.flatten(0, 1), target.flatten(0, 1), strict=True)
    ]
    return torch.stack(scores).mean().item()


def dice_ce(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice over all pixels of the batch, and cross entropy, with MONAI's smoothing."""
    p = logits.sigmoid()
    dice = 1 - (2 * (p * masks).sum() + 1e-5) / (p.sum() + masks.sum() + 1e-5)
    return dice - (masks * p.log() + (1 - masks) * (1 - p).log()).mean()


class TestNetworks:
    @pytest.mark.parametrize(("name", "outputs"), [("resnet50_unet", 1), ("unetpp", 4), ("attention_unet", 1)])
    def test_by_name(self, name: str, outputs: int):
        task = SegmentationTask(name, num_classes=2, in_chans=4)
        images = torch.randn(2, 4, 32, 32)
        assert task(images).shape == (2, 2, 32, 32)
        loss = training_loss(task, images, blobs(2, 2, (32, 32)))
        assert len(task.logits_of_all_outputs(images)) == outputs
        loss.backward()
        # DDP waits for the gradient of every parameter.
        assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []

    @pytest.mark.parametrize(
        ("name", "norms"),
        [
            ("resnet50_unet", {"BatchNorm2d"}),
            ("unetpp", {"BatchNorm2d"}),
            ("attention_unet", {"BatchNorm2d", "InstanceNorm2d"}),
        ],
    )
    def test_normalization(self, name: str, norms: set[str]):
        found = {type(module).__name__ for module in create_segmenter(name).modules()}
        assert {kind for kind in found if "Norm" in kind} == norms

    def test_arguments(self):
        network = create_segmenter("attention_unet", channels=(4, 8), strides=(2,))
        assert sum(parameter.numel() for parameter in network.parameters()) < 10_000

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"'unet'.*resnet50_unet, unetpp, attention_unet"):
            SegmentationTask("unet")

    @pytest.mark.parametrize(("in_chans", "channels"), [(3, 1), (1, 4)])
    def test_images_of_other_channels(self, in_chans: int, channels: int):
        task = SegmentationTask("attention_unet", in_chans=in_chans)
        said = rf"\(2, {channels}, 32, 32\) have {channels} channels?, and .* in_chans={in_chans}: make it {channels} "
        with pytest.raises(ValueError, match=f"^Images of shape {said}"):
            task(torch.zeros(2, channels, 32, 32))

    def test_volumes(self):
        kwargs = {"channels": [4, 8], "strides": [2]}
        task = SegmentationTask("attention_unet", spatial_dims=3, in_chans=1, model_kwargs=kwargs)
        data = DataLoader(TensorDataset(torch.randn(4, 1, 8, 8, 8), blobs(4, 1, (8, 8, 8))), batch_size=2)
        run = trainer()
        run.fit(task, data, data)
        assert {"train/loss", "val/loss", "val/dice", "val/tversky", "val/hausdorff"} <= run.callback_metrics.keys()


class TestNumbers:
    masks = blobs(10)
    logits = logits_like(masks)

    def test_default_loss(self):
        task = SegmentationTask(Given(self.logits))
        loss = training_loss(task, torch.zeros(10, 3, 16, 16), self.masks)
        torch.testing.assert_close(loss, dice_ce(self.logits, self.masks), rtol=1e-5, atol=0)

    def test_default_loss_of_classes_is_over_the_batch_too(self):
        labels = torch.randint(3, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        logits = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        task = SegmentationTask(Given(logits), num_classes=3, activation="softmax")
        p, one_hot = logits.softmax(1), torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1).float()
        pixels = (0, 2, 3)
        dice = 1 - (2 * (p * one_hot).sum(pixels) + 1e-5) / (p.sum(pixels) + one_hot.sum(pixels) + 1e-5)
        expected = dice.mean() + torch.nn.functional.cross_entropy(logits, labels[:, 0])
        loss = training_loss(task, torch.zeros(6, 3, 8, 8), labels)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("stage", ["train", "val"])
    def test_loss_of_half_precision_logits(self, dtype: torch.dtype, stage: str):
        """A mask of more pixels than float16 can count."""
        masks = blobs(2, 1, (400, 400)).to(dtype)
        masks[:, :, 100:] = 1
        logits = logits_like(masks).to(dtype)
        task = SegmentationTask(Given(logits))
        task.half() if dtype == torch.float16 else task.bfloat16()
        logged: dict[str, Tensor] = {}
        task.log_loss = lambda name, loss, count: logged.update({name: loss})
        task.log_metrics = lambda *args: None
        getattr(task, {"train": "training_step", "val": "validation_step"}[stage])((masks, masks), 0)
        expected = dice_ce(logits.double(), masks.double())
        torch.testing.assert_close(logged[f"{stage}/loss"].double(), expected, rtol=1e-5, atol=0)

    def test_values_between_are_scored_from_a_half_on(self):
        masks = self.masks * 0.5 + 0.3  # 0.3 and 0.8
        (result,) = trainer().validate(SegmentationTask(Given(self.logits)), batches(masks), verbose=False)
        assert result["val/dice"] == pytest.approx(dice_of(self.logits > 0, self.masks > 0))

    def test_own_loss(self):
        task = SegmentationTask(Given(self.logits), loss=TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7))
        loss = training_loss(task, torch.zeros(10, 3, 16, 16), self.masks)
        p, t = self.logits.sigmoid().flatten(1), self.masks.flatten(1)
        hits, false, missed = (p * t).sum(1), (p * (1 - t)).sum(1), ((1 - p) * t).sum(1)
        expected = 1 - (hits + 1e-5) / (hits + 0.3 * false + 0.7 * missed + 1e-5)
        torch.testing.assert_close(loss, expected.mean(), rtol=1e-5, atol=0)

    def test_all_outputs_are_trained_and_the_last_is_scored(self):
        other = logits_like(self.masks, seed=7)
        task = SegmentationTask(Given(other, self.logits))
        loss = training_loss(task, torch.zeros(10, 3, 16, 16), self.masks)
        expected = (dice_ce(other, self.masks) + dice_ce(self.logits, self.masks)) / 2
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        task.model.seen = 0
        del task.log
        (result,) = trainer().validate(task, batches(self.masks), verbose=False)
        assert result["val/dice"] == pytest.approx(dice_of(self.logits > 0, self.masks > 0))

    @pytest.mark.parametrize("stage", ["val", "test"])
    @pytest.mark.parametrize("threshold", [0.5, 0.8])
    def test_scores(self, stage: str, threshold: float):
        task = SegmentationTask(Given(self.logits), threshold=threshold)
        run = getattr(trainer(), {"val": "validate", "test": "test"}[stage])
        (result,) = run(task, batches(self.masks), verbose=False)  # batches of 4, 4 and 2
        preds, target = self.logits.sigmoid() >= threshold, self.masks > 0
        hits = (preds & target).flatten(1).sum(1)
        false, missed = (preds & ~target).flatten(1).sum(1), (~preds & target).flatten(1).sum(1)
        assert result[f"{stage}/dice"] == pytest.approx(dice_of(preds, target))
        assert result[f"{stage}/tversky"] == pytest.approx((hits / (hits + 0.3 * false + 0.7 * missed)).mean().item())
        points = [(p[0].nonzero().double(), t[0].nonzero().double()) for p, t in zip(preds, target, strict=True)]
        distances = [torch.cdist(a, b) for a, b in points]
        worst = [max(d.amin(0).max(), d.amin(1).max()).item() for d in distances]
        assert result[f"{stage}/hausdorff"] == pytest.approx(sum(worst) / len(worst))

    def test_classes_without_the_background(self):
        labels = torch.randint(3, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        logits = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        task = SegmentationTask(Given(logits), num_classes=3, activation="softmax")
        (result,) = trainer().test(task, batches(labels), verbose=False)
        chosen, classes = logits.argmax(1, keepdim=True), torch.tensor([1, 2]).view(2, 1, 1)
        assert result["test/dice"] == pytest.approx(dice_of(chosen == classes, labels == classes))

    def test_probabilities_of_half_precision_logits(self):
        logits = torch.tensor([[[[-9.0, 0.0, 9.0]]]])
        sigmoid = SegmentationTask(Given(logits)).probabilities(logits.bfloat16())
        assert sigmoid.dtype == torch.float32
        torch.testing.assert_close(sigmoid, logits.sigmoid())


class TestBadInput:
    def test_masks_of_another_size(self):
        task = SegmentationTask(nn.Conv2d(3, 1, 1))
        with pytest.raises(ValueError, match=r"Masks have shape \(4, 2, 8, 8\).*ask for \(4, 1, 8, 8\)"):
            fit(task, batches(blobs(4, 2, (8, 8))))

    @pytest.mark.parametrize(
        ("network", "message"),
        [
            (nn.Conv2d(3, 2, 1), r"into shape \(1, 2, 8, 8\), and num_classes=1"),
            (nn.Conv2d(3, 1, 3), r"into shape \(1, 1, 6, 6\), and num_classes=1"),
        ],
        ids=["width", "size"],
    )
    def test_network_of_another_shape(self, network: nn.Module, message: str):
        with pytest.raises(ValueError, match=message):
            SegmentationTask(network)(torch.zeros(1, 3, 8, 8))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"activation": "relu"}, "activation must be 'sigmoid' or 'softmax', got 'relu'"),
            ({"num_classes": 0}, "at least 1 with sigmoid, got 0"),
            ({"num_classes": 1, "activation": "softmax"}, "at least 2 with softmax, got 1"),
            ({"threshold": 1.0}, r"threshold is a probability, in \(0, 1\), got 1.0"),
            ({"model_kwargs": {"channels": [4]}}, "model_kwargs are for a model by name"),
        ],
    )
    def test_arguments(self, arguments: dict, message: str):
        with pytest.raises(ValueError, match=message):
            SegmentationTask(nn.Conv2d(3, 1, 1), **arguments)


def test_checkpoint_of_a_network_by_name(tmp_path: Path):
    kwargs = {"channels": [4, 8], "strides": [2]}
    task = SegmentationTask("attention_unet", threshold=0.3, model_kwargs=kwargs)
    run = fit(task, batches(blobs(4)))
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]["threshold"] == 0.3
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded.eval()(images), task.eval()(images))
    assert loaded.threshold == 0.3


def test_learns_a_bright_square():
    torch.manual_seed(0)
    images, masks = torch.randn(32, 1, 16, 16) * 0.3, torch.zeros(32, 1, 16, 16)
    for index in range(32):
        if index % 3:  # a third of the masks is empty
            top, left = torch.randint(0, 12, (2,)).tolist()
            masks[index, 0, top : top + 4, left : left + 4] = 1
    images += 2 * masks
    kwargs = {"channels": [8, 16], "strides": [2]}
    task = SegmentationTask(
        "attention_unet", in_chans=1, model_kwargs=kwargs, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2)
    )
    data = DataLoader(TensorDataset(images, masks), batch_size=8)
    run = trainer(max_epochs=12)
    run.fit(task, data, data)
    assert run.callback_metrics["val/dice"] > 0.9
