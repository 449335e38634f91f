"""Outputs of several resolutions, sizes that a network does not take, inferers, and pixels that do not count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer, SlidingWindowInfererAdapt
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.nets import DynUNet, SegResNetDS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import SegmentationTask
from lightning_znorm.tasks.outputs import averages_images, counted_pixels, crop_to, outputs_of, pad_to_multiple
from tests.trainers import trainer

SHAPE = (2, 3, 8, 12)


def logits(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(seed))


def masks_of(size: tuple[int, ...], classes: int = 2, count: int = 2, seed: int = 3) -> Tensor:
    return torch.randint(classes, (count, 1, *size), generator=torch.Generator().manual_seed(seed))


class TestOutputsOf:
    def test_of_one_size_have_one_weight_and_the_last_is_the_prediction(self):
        returned = [logits(8, 12, seed=seed) for seed in range(3)]
        outputs = outputs_of(returned, "Net", SHAPE, 1)
        assert [output.weight for output in outputs] == pytest.approx([1 / 3] * 3)
        assert outputs[-1].logits is returned[-1]

    @pytest.mark.parametrize("reverse", [False, True])
    def test_of_lower_resolution(self, reverse: bool):
        returned = [logits(8, 12), logits(4, 6), logits(2, 3)]
        outputs = outputs_of(returned[::-1] if reverse else returned, "Net", SHAPE, 1)
        assert outputs[-1].logits is returned[0]
        assert [output.weight for output in outputs] == pytest.approx([1 / 7, 2 / 7, 4 / 7])
        expected = F.interpolate(returned[1], (8, 12), mode="bilinear", align_corners=False)
        assert torch.equal(outputs[1].logits, expected)

    def test_in_one_tensor(self):
        returned = [logits(8, 12, seed=seed) for seed in range(3)]
        outputs = outputs_of(torch.stack(returned, dim=1), "Net", SHAPE, 1)
        assert torch.equal(outputs[-1].logits, returned[0])
        assert [output.weight for output in outputs] == pytest.approx([1 / 7, 2 / 7, 4 / 7])

    @pytest.mark.parametrize(
        ("returned", "found"),
        [
            (logits(4, 6), r"shape \(2, 1, 4, 6\)"),
            ([logits(4, 6), logits(2, 3)], r"shape \(2, 1, 4, 6\)"),  # none is of full size
            ([logits(8, 12), logits(16, 24)], r"shape \(2, 1, 16, 24\)"),
            ([logits(8, 12), logits(8, 12).expand(2, 2, 8, 12)], r"shape \(2, 2, 8, 12\)"),
            (torch.zeros(2, 2, 2, 8, 12), r"shape \(2, 2, 2, 8, 12\)"),  # two classes
            (torch.zeros(2, 0, 1, 8, 12), r"shape \(2, 0, 1, 8, 12\)"),
        ],
    )
    def test_others_are_refused(self, returned: Any, found: str):
        with pytest.raises(ValueError, match=rf"^Net turned images of shape \(2, 3, 8, 12\) into {found}, and num_cl"):
            outputs_of(returned, "Net", SHAPE, 1)

    def test_an_empty_batch(self):
        empty = [torch.zeros(0, 1, 8, 12), torch.zeros(0, 1, 4, 6)]
        assert [tuple(each.logits.shape) for each in outputs_of(empty, "Net", (0, 3, 8, 12), 1)] == [(0, 1, 8, 12)] * 2

    def test_a_subclass_that_chooses_among_the_outputs(self):
        class Last(SegmentationTask):
            def logits_of_all_outputs(self, images: Tensor) -> list[Tensor]:
                return super().logits_of_all_outputs(images)[-1:]

        torch.manual_seed(0)
        network = SegmentationTask("unetpp", model_kwargs={"features": [4, 4, 8, 8, 8, 4]}).model
        losses = []
        for kind in (Last, SegmentationTask):
            task = kind(network)
            task.log = lambda *args, **kwargs: None
            losses.append(task.training_step((torch.ones(2, 3, 32, 32), torch.ones(2, 1, 32, 32)), 0))
        last = network(torch.ones(2, 3, 32, 32))[-1]
        torch.testing.assert_close(losses[0], DiceCELoss(sigmoid=True, batch=True)(last, torch.ones(2, 1, 32, 32)))
        assert losses[0] != losses[1]

    def test_the_training_loss_by_hand(self):
        class Pyramid(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Conv2d(3, 1, 1)

            def forward(self, images: Tensor) -> list[Tensor]:
                full = self.layer(images)
                return [full, full[..., ::2, ::2]]

        torch.manual_seed(0)
        task = SegmentationTask(Pyramid(), loss=nn.BCEWithLogitsLoss())
        task.log = lambda *args, **kwargs: None
        images, masks = torch.randn(SHAPE), masks_of((8, 12)).float()
        full, half = task.model(images)
        half = F.interpolate(half, (8, 12), mode="bilinear", align_corners=False)
        loss = F.binary_cross_entropy_with_logits
        expected = 2 / 3 * loss(full, masks) + 1 / 3 * loss(half, masks)
        torch.testing.assert_close(task.training_step((images, masks), 0), expected)
        assert torch.equal(task(images), full)


def dynunet(deep: bool = True) -> nn.Module:
    torch.manual_seed(0)
    kernels, strides = [[3, 3, 3]] * 4, [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    return DynUNet(3, 1, 3, kernels, strides, strides[1:], [4, 8, 8, 8], deep_supervision=deep, deep_supr_num=2)


def segresnet() -> nn.Module:
    torch.manual_seed(0)
    return SegResNetDS(3, init_filters=8, in_channels=1, out_channels=3, blocks_down=(1, 1, 1), dsdepth=3)


@pytest.mark.parametrize(("network", "outputs"), [(dynunet, 3), (segresnet, 2)])
def test_networks_of_monai_train_and_are_scored_by_their_full_output(network: Callable[[], nn.Module], outputs: int):
    task = SegmentationTask(network(), num_classes=3, activation="softmax")
    images = torch.randn(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(images, masks_of((8, 16, 16), 3)), batch_size=2)
    assert len(task.train().logits_of_all_outputs(images)) == outputs
    torch.stack([logits.sum() for logits in task.logits_of_all_outputs(images)]).sum().backward()
    assert all(parameter.grad is not None for parameter in task.parameters())  # or DDP would wait
    run = trainer()
    run.fit(task, data, data)
    expected = task.model.eval()(images)
    assert torch.equal(task.eval()(images), expected)
    assert run.callback_metrics["val/dice"] > 0


class Strided(nn.Module):
    """Takes sizes that are multiples of four only, and says what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)
        self.seen: list[torch.Size] = []

    def forward(self, images: Tensor) -> Tensor:
        assert all(size % 4 == 0 for size in images.shape[2:])
        self.seen.append(images.shape)
        return self.layer(images)


class TestSizeDivisor:
    def test_padding_is_undone(self):
        images = torch.randn(2, 3, 5, 7)
        padded = pad_to_multiple(images, 4)
        assert padded.shape == (2, 3, 8, 8)
        assert torch.equal(crop_to(padded, (5, 7)), images)
        assert torch.equal(padded[..., 5:, :7], images[..., -1:, :].expand(2, 3, 3, 7))
        assert pad_to_multiple(images[..., :4, :4], 4).data_ptr() == images.data_ptr()
        assert pad_to_multiple(torch.randn(1, 1, 3, 4, 5), 4).shape == (1, 1, 4, 4, 8)

    def test_in_every_step(self):
        task = SegmentationTask(Strided(), size_divisor=4)
        data = DataLoader(TensorDataset(torch.randn(2, 3, 6, 9), masks_of((6, 9))), batch_size=2)
        run = trainer()
        run.fit(task, data, data)
        run.test(task, data, verbose=False)
        (probabilities,) = run.predict(task, data)
        assert {tuple(shape) for shape in task.model.seen} == {(2, 3, 8, 12)}
        images = data.dataset.tensors[0]
        torch.testing.assert_close(probabilities, task.model.layer(images).sigmoid())

    @pytest.mark.parametrize(
        ("name", "kwargs", "divisor"),
        [
            ("resnet50_unet", {}, 32),
            ("attention_unet", {"channels": [4, 8, 8], "strides": [2, 2]}, 4),
            ("unetpp", {}, 1),
        ],
    )
    def test_networks_by_name_take_any_size(self, name: str, kwargs: dict[str, Any], divisor: int):
        task = SegmentationTask(name, model_kwargs=kwargs)
        assert task.size_divisor == divisor
        assert task.eval()(torch.zeros(1, 3, 35, 50)).shape == (1, 1, 35, 50)

    @pytest.mark.parametrize(("divisor", "error"), [(0, ValueError), (1.5, TypeError), ("4", TypeError)])
    def test_out_of_range(self, divisor: Any, error: type[Exception]):
        with pytest.raises(error, match=r"^size_divisor must be "):
            SegmentationTask(Strided(), size_divisor=divisor)


class TestInferer:
    images = torch.randn(2, 3, 20, 12, generator=torch.Generator().manual_seed(0))

    def task(self, **kwargs: Any) -> SegmentationTask:
        torch.manual_seed(0)
        # With two convolutions, what is at the border of a window differs from what the whole image gives.
        network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
        return SegmentationTask(network, **kwargs)

    def test_in_evaluation_and_prediction_alone(self):
        inferer = SlidingWindowInferer(roi_size=(8, 8), sw_batch_size=3, overlap=0.5, mode="gaussian")
        task, whole = self.task(inferer=inferer), self.task()
        expected = inferer(self.images, whole.model)
        assert not torch.allclose(expected, whole(self.images))
        torch.testing.assert_close(task.infer(self.images), expected)
        torch.testing.assert_close(task(self.images), whole(self.images))
        masks = masks_of((20, 12))
        data = DataLoader(TensorDataset(self.images, masks), batch_size=2)
        run = trainer()
        (result,) = run.test(task, data, verbose=False)
        preds, target = expected >= 0, masks.bool()
        dice = [2 * (p & t).sum() / (p.sum() + t.sum()) for p, t in zip(preds, target, strict=True)]
        assert result["test/dice"] == pytest.approx(torch.stack(dice).mean().item())
        loss = DiceCELoss(sigmoid=True, batch=True)(expected, masks.float())
        assert result["test/loss"] == pytest.approx(loss.item(), rel=1e-5)
        (validated,) = run.validate(task, data, verbose=False)
        assert validated["val/dice"] == result["test/dice"]
        (probabilities,) = run.predict(task, data)
        torch.testing.assert_close(probabilities, expected.sigmoid())
        run = trainer()
        run.fit(task, data, data)
        assert run.callback_metrics["train/loss"] != pytest.approx(result["test/loss"])

    def test_windows_are_padded_too(self):
        inferer = SlidingWindowInferer(roi_size=(6, 6))
        task = SegmentationTask(Strided(), inferer=inferer, size_divisor=4)
        assert task.infer(self.images).shape == (2, 1, 20, 12)

    def test_one_that_returns_something_else(self):
        task = self.task(inferer=lambda inputs, network: [network(inputs)])
        with pytest.raises(
            ValueError, match=r"^function turned images of shape \(2, 3, 20, 12\) into a list of Tensor"
        ):
            task.infer(self.images)

    def test_one_that_cannot_be_called(self):
        with pytest.raises(TypeError, match=r"^inferer must be callable with images and a network, .* got int"):
            self.task(inferer=3)

    def test_another_of_monai(self):
        task = self.task(inferer=SlidingWindowInfererAdapt(roi_size=(8, 8)))
        assert task.predict_step(self.images).shape == (2, 1, 20, 12)


class TestIgnoredPixels:
    size = (6, 7)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, *size, generator=generator)
    classes = torch.randint(3, (3, 1, *size), generator=generator)
    ignored = torch.rand(3, 1, *size, generator=generator) < 0.4

    def test_counted_pixels(self):
        kept, masks = counted_pixels(self.logits, self.classes, ~self.ignored)
        count = int((~self.ignored).sum())
        assert kept.shape == (1, 3, count, 1)
        assert masks.shape == (1, 1, count, 1)
        for channel in range(3):
            assert torch.equal(kept[0, channel, :, 0], self.logits[:, channel][~self.ignored[:, 0]])
        assert torch.equal(masks.flatten(), self.classes[~self.ignored])

    @pytest.mark.parametrize(
        ("loss", "expected"),
        [(DiceLoss(), True), (DiceLoss(batch=True), False), (DiceCELoss(), True), (nn.BCEWithLogitsLoss(), False)],
    )
    def test_which_losses_average_images(self, loss: nn.Module, expected: bool):
        assert averages_images(loss) == expected

    def softmax_task(self, **kwargs: Any) -> SegmentationTask:
        task = SegmentationTask(nn.Conv2d(3, 3, 1), num_classes=3, activation="softmax", ignore_index=255, **kwargs)
        task.log = lambda *args, **kwargs: None
        task.model = nn.Identity()
        return task

    def test_loss_and_its_gradient_by_hand(self):
        inputs = self.logits.clone().requires_grad_()
        masks = self.classes.masked_fill(self.ignored, 255)
        loss = self.softmax_task().training_step((inputs, masks), 0)
        flat = self.logits.double().movedim(1, -1)[~self.ignored[:, 0]].requires_grad_()
        true = F.one_hot(self.classes[~self.ignored], 3).double()
        p = flat.softmax(1)
        dice = 1 - (2 * (p * true).sum(0) + 1e-5) / (p.sum(0) + true.sum(0) + 1e-5)
        expected = dice.mean() + F.cross_entropy(flat, self.classes[~self.ignored])
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        loss.backward()
        expected.backward()
        assert (inputs.grad.movedim(1, -1)[self.ignored[:, 0]] == 0).all()
        torch.testing.assert_close(
            inputs.grad.movedim(1, -1)[~self.ignored[:, 0]].double(), flat.grad, rtol=1e-4, atol=1e-7
        )

    def test_loss_that_averages_images(self):
        masks = self.classes.masked_fill(self.ignored, 255)
        loss = DiceLoss(softmax=True, to_onehot_y=True, include_background=False)
        found = self.softmax_task(loss=loss).training_step((self.logits, masks), 0)
        each = []
        for image, true, ignored in zip(self.logits, self.classes, self.ignored, strict=True):
            p, t = image.softmax(0)[1:, ~ignored[0]], F.one_hot(true[~ignored], 3).T[1:]
            each.append(1 - (2 * (p * t).sum(1) + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5))
        torch.testing.assert_close(found, torch.stack(each).mean())

    def test_nothing_counts(self):
        inputs = self.logits.clone().requires_grad_()
        loss = self.softmax_task().training_step((inputs, torch.full_like(self.classes, 255)), 0)
        loss.backward()
        assert loss == 0
        assert (inputs.grad == 0).all()

    def test_nothing_counts_in_half_precision(self):
        task = SegmentationTask(nn.Identity(), ignore_index=255)
        logits = torch.full((1, 1, 512, 512), -2.0, dtype=torch.float16)  # their sum overflows
        assert task._loss(logits, torch.full_like(logits, 255), None) == 0

    def test_logged_losses_are_means_over_images_that_count(self):
        class Returns(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(()))

            def forward(self, images: Tensor) -> Tensor:
                return images + self.weight

        masks = (self.classes > 0).float()
        masks[1] = 255  # one of three images does not count
        images = self.logits[:, :1]
        task = SegmentationTask(Returns(), ignore_index=255, loss=nn.BCEWithLogitsLoss())
        data = DataLoader(TensorDataset(images, masks), batch_size=1)
        (result,) = trainer().validate(task, data, verbose=False)
        expected = F.binary_cross_entropy_with_logits(images[[0, 2]], masks[[0, 2]])
        assert result["val/loss"] == pytest.approx(expected.item())
        run = trainer()
        task.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
        run.fit(task, data, data)
        assert run.callback_metrics["train/loss"].item() == pytest.approx(expected.item())

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32], ids=str)
    def test_scores(self, dtype: torch.dtype):
        masks = self.classes.masked_fill(self.ignored, 255).to(dtype)
        preds, target = self.softmax_task().scored(self.logits.softmax(1), masks)
        assert preds.shape == target.shape == (3, 2, *self.size)
        for number in (1, 2):
            predicted = (self.logits.argmax(1, keepdim=True) == number) & ~self.ignored
            assert torch.equal(preds[:, [number - 1]], predicted)
            assert torch.equal(target[:, [number - 1]], (self.classes == number) & ~self.ignored)

    def test_with_sigmoid_a_pixel_is_ignored_in_all_channels(self):
        task = SegmentationTask(nn.Identity(), num_classes=2, ignore_index=-1, loss=nn.BCEWithLogitsLoss())
        task.log = lambda *args, **kwargs: None
        masks = (self.classes > 0).long().expand(-1, 2, -1, -1).clone()
        masks[:, :1][self.ignored] = -1  # in one channel
        inputs = self.logits[:, :2]
        preds, target = task.scored(inputs.sigmoid(), masks)
        assert not (preds | target).logical_and(self.ignored).any()
        assert torch.equal(preds, (inputs >= 0) & ~self.ignored)
        kept = (~self.ignored).expand(-1, 2, -1, -1)
        expected = F.binary_cross_entropy_with_logits(inputs[kept], masks[kept].float())
        torch.testing.assert_close(task.training_step((inputs, masks), 0), expected)

    def test_in_training_validation_and_test(self):
        network = nn.Conv2d(3, 3, 1)
        task = SegmentationTask(network, num_classes=3, activation="softmax", ignore_index=255)
        data = DataLoader(TensorDataset(self.logits, self.classes.masked_fill(self.ignored, 255)), batch_size=3)
        run = trainer()
        run.fit(task, data, data)
        other = DataLoader(TensorDataset(torch.where(self.ignored, 9.0, self.logits), data.dataset.tensors[1]), 3)
        assert run.test(task, data, verbose=False) == run.test(task, other, verbose=False)

    def test_other_wrong_values_are_refused(self):
        masks = self.classes.masked_fill(self.ignored, 254)
        with pytest.raises(
            ValueError, match=r"run from 0 to 254 .* allows whole numbers from 0 to 2, and 255 for pixels"
        ):
            self.softmax_task().training_step((self.logits, masks), 0)

    def test_a_wrong_value_beside_ignored_ones_when_checks_are_put_off(self, monkeypatch: pytest.MonkeyPatch):
        task, masks = self.softmax_task(), self.classes.masked_fill(self.ignored, 255)
        plain = task.training_step((self.logits, masks), 0)
        monkeypatch.setattr(SegmentationTask, "defers_checks", lambda self, device: True)
        monkeypatch.setattr(SegmentationTask, "_refuse_noted_targets", lambda self: None)
        assert torch.equal(task.training_step((self.logits, masks), 0), plain)
        masks = torch.where(self.classes == 2, 7, masks)
        assert task.training_step((self.logits, masks), 0) == 0
        with pytest.raises(ValueError, match=r"^Masks run from 0 to 7 in batch 0 of training"):
            task.target_check.refuse(task.target_check.notes(masks.device).unsqueeze(0))

    @pytest.mark.parametrize(
        ("ignored", "activation", "error"),
        [
            (1, "sigmoid", ValueError),
            (2, "softmax", ValueError),
            (0.5, "softmax", TypeError),
            (True, "sigmoid", TypeError),
        ],
    )
    def test_out_of_range(self, ignored: Any, activation: Any, error: type[Exception]):
        with pytest.raises(error, match=r"^ignore_index"):
            SegmentationTask(nn.Identity(), num_classes=3, activation=activation, ignore_index=ignored)

    def test_a_class_number_beyond_the_last_may_be_ignored(self):
        SegmentationTask(nn.Identity(), num_classes=3, activation="softmax", ignore_index=3)
        SegmentationTask(nn.Identity(), num_classes=3, ignore_index=2)
