"""Losses and scores are those of the logits in float64, whatever precision, default type and targets' type are."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from monai.losses import DiceCELoss, FocalLoss, SSIMLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from tests.dtypes import DEFAULTS, default_dtype, pairwise
from tests.tasks.test_segmentation import dice_ce
from tests.trainers import trainer

PRECISIONS = ["64-true", "32-true", "16-true", "bf16-true", "bf16-mixed"]
INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64]
EVERY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


class Logits(nn.Module):
    """Answers with given logits, which half precision has too, in the type that the precision makes of a network's."""

    def __init__(self, logits: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        assert torch.equal(logits.bfloat16().half().double(), logits)
        self.logits, self.dtype, self.seen = logits, dtype, 0
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        first = self.seen % len(self.logits)
        self.seen += len(images)
        dtype = self.gain.dtype if self.dtype is None else self.dtype
        return self.gain.to(dtype) * self.logits[first : first + len(images)].to(dtype)


def logged(task: Any, targets: Tensor, precision: str, default: torch.dtype = torch.float32) -> dict[str, float]:
    images = torch.zeros(len(targets), 3, *targets.shape[2:], dtype=torch.float32)
    data = DataLoader(TensorDataset(images, targets), batch_size=2)
    with default_dtype(default):
        run: Trainer = trainer(precision=precision, num_sanity_val_steps=0)
        run.fit(task, data, data)
    return {name: value.item() for name, value in run.callback_metrics.items()}


def frozen(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def network(logits: Tensor, precision: str) -> nn.Module:
    return Logits(logits, torch.bfloat16 if precision == "bf16-mixed" else None)


@pytest.mark.parametrize(
    ("default", "dtype", "precision"),
    pairwise(DEFAULTS, [torch.bool, *INTEGERS, torch.float16, torch.float32, torch.float64], PRECISIONS),
    ids=str,
)
def test_masks(default: torch.dtype, dtype: torch.dtype, precision: str) -> None:
    """Of more pixels than float16 can count."""
    masks = torch.ones(2, 1, 300, 300, dtype=torch.float64)
    logits = torch.full_like(masks, 0.75)
    logits[..., 200:, :] = -1.5
    logits[1, ..., :200, ::3] = 4.0
    task = SegmentationTask(network(logits, precision), optimizer=frozen)
    result = logged(task, masks.to(dtype), precision, default)
    loss = pytest.approx(dice_ce(logits, masks).item(), rel=1e-6)
    assert (result["train/loss"], result["val/loss"]) == (loss, loss)
    assert result["val/dice"] == pytest.approx(0.8, rel=1e-7)
    assert result["val/tversky"] == pytest.approx(2 / 2.7, rel=1e-7)
    assert result["val/hausdorff"] == 100


@pytest.mark.parametrize(
    ("num_classes", "default", "dtype", "precision"),
    pairwise([1, 2, 5], DEFAULTS, [torch.bool, *INTEGERS], PRECISIONS),
    ids=str,
)
def test_labels(num_classes: int, default: torch.dtype, dtype: torch.dtype, precision: str) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.randint(2, (10,), generator=generator)
    # Large ones next to one another, which are equally probable in half precision.
    logits = 8 + torch.randint(8, (10, num_classes), generator=generator).double() / 16
    if num_classes == 1:
        logits -= 8.25
        one_hot = labels.double()
        expected = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], one_hot)
        right = (logits[:, 0] > 0) == (labels == 1)
    else:
        expected = nn.functional.cross_entropy(logits, labels)
        right = logits.argmax(1) == labels
    task = ClassificationTask(network(logits, precision), num_classes, optimizer=frozen)
    result = logged(task, labels.to(dtype), precision, default)
    loss = pytest.approx(expected.item(), rel=1e-6)
    assert (result["train/loss"], result["val/loss"]) == (loss, loss)
    assert result["val/accuracy"] == pytest.approx(right.double().mean().item())


@EVERY_PRECISION
def test_probabilities(precision: str) -> None:
    logits = torch.tensor([[3.0, 3.0625, -6.0]], dtype=torch.float64)
    task = ClassificationTask(network(logits, precision), 3)
    images = DataLoader(torch.zeros(1, 3), batch_size=1)
    (probabilities,) = trainer(precision=precision).predict(task, images)
    assert probabilities.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    torch.testing.assert_close(probabilities.double(), logits.softmax(1), rtol=1e-6, atol=0)


LOSSES = {
    "cross entropy with weights": lambda: DiceCELoss(
        softmax=True, to_onehot_y=True, weight=torch.tensor([0.3, 0.7, 1.1])
    ),
    "focal with weights": lambda: FocalLoss(to_onehot_y=True, use_softmax=True, weight=torch.tensor([0.3, 0.7, 1.1])),
    "with a kernel that it makes itself": lambda: SSIMLoss(2),
}


@EVERY_PRECISION
@pytest.mark.parametrize("name", LOSSES)
def test_any_loss_is_computed_in_float32_or_more(name: str, precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-8, 8, (2, 3, 16, 16), generator=generator).double() / 4
    masks = torch.randint(3, (2, 1, 16, 16), generator=generator)
    kind: dict[str, Any] = {"num_classes": 3, "activation": "softmax"}
    if name == "with a kernel that it makes itself":
        masks, kind = torch.randint(2, (2, 3, 16, 16), generator=generator), {"num_classes": 3}
    losses = []
    for each in ("32-true", precision):
        task = SegmentationTask(network(logits, each), loss=LOSSES[name](), optimizer=frozen, **kind)
        result = logged(task, masks, each)
        losses.append((result["train/loss"], result["val/loss"]))
    tight = precision != "64-true"
    assert losses[1] == (losses[0] if tight else pytest.approx(losses[0], rel=1e-6))


class Perceptual(nn.Module):
    """A loss with a layer, as those that compare features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 3).requires_grad_(False)
        with torch.no_grad():
            self.features.weight.copy_(torch.arange(18.0).view(2, 1, 3, 3) / 7)

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        return (self.features(logits) - self.features(masks)).abs().mean()


@EVERY_PRECISION
def test_a_loss_with_a_layer(precision: str) -> None:
    masks = torch.randint(2, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    logits = torch.full((2, 1, 8, 8), 0.75, dtype=torch.float64)
    expected = Perceptual().double()(logits, masks.double())
    task = SegmentationTask(network(logits, precision), loss=Perceptual(), optimizer=frozen)
    assert logged(task, masks, precision)["train/loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_layers_that_a_loss_shares_with_the_network_are_the_networks() -> None:
    loss, network = Perceptual(), nn.Conv2d(1, 1, 1)
    loss.shared = network
    task = SegmentationTask(network, loss=loss).half()
    assert task.model.weight.dtype == torch.float16
    assert task.criterion.features.weight.dtype == torch.float32


def test_a_loss_that_a_subclass_makes_a_function() -> None:
    class OwnLoss(ClassificationTask):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 3), 3)
            del self.criterion
            self.criterion = nn.functional.cross_entropy

    assert OwnLoss().half().model.weight.dtype == torch.float16


def test_weights_of_a_loss_go_where_the_task_goes() -> None:
    task = SegmentationTask(nn.Conv2d(3, 3, 1), 3, activation="softmax", loss=LOSSES["focal with weights"]())
    weights = {name: buffer.clone() for name, buffer in task.criterion.named_buffers()}
    assert weights
    for dtype in (torch.float16, torch.bfloat16):
        task.to(dtype)
        assert task.model.weight.dtype == dtype
        assert all(torch.equal(buffer, weights[name]) for name, buffer in task.criterion.named_buffers())
    task.double()
    assert {buffer.dtype for buffer in task.criterion.buffers()} == {torch.float64}
    task.to("meta")
    assert {tensor.device.type for tensor in task.state_dict().values()} == {"meta"}
