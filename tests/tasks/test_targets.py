"""Masks and labels that cannot be are found in whichever batch they are, at once or at an epoch's end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from lightning_znorm.tasks.targets import TargetCheck
from tests.distributed import run_distributed
from tests.tasks.ddp_targets import meet_wrong_labels
from tests.trainers import trainer

# Masks with a wrong value count as empty, and then there is no foreground to score. If an untrained network predicts
# none either, there is nothing.
pytestmark = pytest.mark.filterwarnings("ignore:DiceScore is NaN. all .* are empty in :UserWarning")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


Task = ClassificationTask | SegmentationTask

LR = 0.1


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def loader(images: Tensor, targets: Tensor, batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(images, targets), batch_size=batch_size)


# By name: a task, and a good target of it.
TASKS: dict[str, tuple[Callable[[], Task], Tensor]] = {
    "one mask": (lambda: SegmentationTask(nn.Conv2d(3, 1, 1), optimizer=sgd), torch.ones(1, 4, 4)),
    "two masks": (lambda: SegmentationTask(nn.Conv2d(3, 2, 1), num_classes=2, optimizer=sgd), torch.ones(2, 4, 4)),
    "class of each pixel": (
        lambda: SegmentationTask(nn.Conv2d(3, 3, 1), num_classes=3, activation="softmax", optimizer=sgd),
        torch.ones(1, 4, 4),
    ),
    "two classes": (
        lambda: ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(48, 1)), 1, optimizer=sgd),
        torch.ones(()),
    ),
    "three classes": (
        lambda: ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), 3, optimizer=sgd),
        torch.ones(()),
    ),
}
# A task, the wrong value, its type, and what is said of it.
WRONG = [
    (
        "one mask",
        255,
        torch.uint8,
        "Masks run from 1 to 255 in {}, and activation='sigmoid' with num_classes=1 allows 0",
    ),
    ("one mask", 255, torch.float32, "Masks run from 1 to 255 in {}, .* pass masks > 0"),
    ("one mask", 65535, torch.uint16, "Masks run from 1 to 65535 in {}"),
    ("one mask", 1.001, torch.float32, "Masks run from 1 to 1.001 in {}"),
    ("one mask", -1, torch.int64, "Masks run from -1 to 1 in {}"),
    ("one mask", torch.nan, torch.float32, "Masks hold NaN in {}: correct them"),
    ("one mask", torch.inf, torch.float64, "Masks run from 1 to inf in {}"),
    ("two masks", 2, torch.int16, "Masks run from 1 to 2 in {}, and .* num_classes=2 allows 0 to 1"),
    (
        "class of each pixel",
        3,
        torch.int64,
        "Masks run from 1 to 3 in {}, .* num_classes=3 allows whole numbers from 0",
    ),
    ("class of each pixel", -1, torch.int32, "Masks run from -1 to 1 in {}"),
    ("class of each pixel", 255, torch.uint8, "Masks run from 1 to 255 in {}"),
    ("class of each pixel", 1.5, torch.float32, "Masks are not whole numbers in {}"),
    ("class of each pixel", torch.nan, torch.float16, "Masks hold NaN in {}"),
    ("two classes", 2, torch.int64, "Labels run from 1 to 2 in {}, and num_classes=1 allows whole numbers from 0 to 1"),
    ("two classes", -1, torch.int8, "Labels run from -1 to 1 in {}"),
    ("two classes", 0.5, torch.float32, "Labels are not whole numbers in {}"),
    ("two classes", torch.nan, torch.float32, "Labels hold NaN in {}"),
    ("three classes", 3, torch.int32, "Labels run from 1 to 3 in {}, .* change num_classes or the labels"),
    ("three classes", -3, torch.int64, "Labels run from -3 to 1 in {}"),
    ("three classes", 70000, torch.uint32, "Labels run from 1 to 70000 in {}"),
]
EVERY_WRONG = pytest.mark.parametrize(("name", "value", "dtype", "message"), WRONG)


def targets_of(name: str, value: float | None, dtype: torch.dtype) -> Tensor:
    """Of a batch of four, the last of them wrong."""
    _, target = TASKS[name]
    targets = target.to(dtype).repeat(4, *[1] * target.ndim)
    if value is not None:
        targets.view(-1)[-1] = torch.tensor(value, dtype=torch.float64).to(dtype)
    return targets


def data(name: str, value: float | None = None, wrong_batch: int = 1) -> DataLoader:
    """Three batches, one of them with one wrong value."""
    targets = [targets_of(name, value if number == wrong_batch else None, torch.int64) for number in range(3)]
    return loader(torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.cat(targets))


def put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done where a look at values would wait for a device."""
    for task in (ClassificationTask, SegmentationTask):
        monkeypatch.setattr(task, "defers_checks", lambda self, device: True)


class Seen(Callback):
    """Counts batches, and keeps the weights after each of training."""

    def __init__(self) -> None:
        self.count = 0
        self.weights: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.weights.append([parameter.detach().clone() for parameter in pl_module.parameters()])

    def on_validation_batch_end(self, *_: Any) -> None:
        self.count += 1

    def on_test_batch_end(self, *_: Any) -> None:
        self.count += 1


@EVERY_WRONG
def test_at_once(name: str, value: float, dtype: torch.dtype, message: str) -> None:
    task, images = TASKS[name][0](), torch.randn(4, 3, 4, 4)
    for stage, step in (("training", "training_step"), ("validation", "validation_step"), ("test", "test_step")):
        if stage == "training" and value == 0.5:
            continue  # the probability of class 1
        with pytest.raises(ValueError, match=message.format(f"batch 3 of {stage}")):
            getattr(task, step)((images, targets_of(name, value, dtype)), 3)


@EVERY_WRONG
def test_put_off(name: str, value: float, dtype: torch.dtype, message: str) -> None:
    check, good = TASKS[name][0]().target_check, targets_of(name, None, dtype)
    for batch_idx, targets in enumerate([good, good, targets_of(name, value, dtype), good]):
        fitting, misfit = check.note(targets, "test", batch_idx)
        assert misfit == (batch_idx == 2)
        check.require(fitting, "test", batch_idx)
    with pytest.raises(ValueError, match=message.format("batch 2 of test")):
        check.refuse(check.notes(torch.device("cpu")).unsqueeze(0))
    check.refuse(check.notes(torch.device("cpu")).unsqueeze(0))  # once said, forgotten


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("is_put_off", [False, True])
@pytest.mark.parametrize("stage", ["training", "validation", "test"])
def test_in_a_later_batch(name: str, stage: str, is_put_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_put_off:
        put_off(monkeypatch)
    seen, run = Seen(), {"training": "fit", "validation": "validate", "test": "test"}[stage]
    good = [data(name)] * (run == "fit")
    with pytest.raises(ValueError, match=rf" run from 1 to 77 in batch 1 of {stage}, and"):
        getattr(trainer(callbacks=[seen], num_sanity_val_steps=0), run)(TASKS[name][0](), data(name, 77), *good)
    assert (len(seen.weights) if run == "fit" else seen.count) == (3 if is_put_off else 1)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint64, torch.int16, torch.float32], ids=str)
def test_good_targets_of_any_type_give_the_same(name: str, dtype: torch.dtype) -> None:
    task, images = TASKS[name][0](), torch.randn(4, 3, 4, 4)
    task.log = lambda *_, **__: None
    targets = targets_of(name, None, dtype)
    if name == "three classes" and dtype.is_floating_point:
        with pytest.raises(
            TypeError, match=r"Labels are torch.float32, and class numbers are integers: pass labels.lo"
        ):
            task.training_step((images, targets), 0)
        return
    expected = task.training_step((images, targets_of(name, None, torch.int64)), 0)
    fitting, misfit = task.target_check.note(targets, "training", 0)
    assert not misfit
    for each in (targets, fitting):
        assert torch.equal(task.training_step((images, each), 0), expected)


@pytest.mark.parametrize("name", TASKS)
def test_on_a_device_a_wrong_batch_trains_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_off(monkeypatch)
    make, _ = TASKS[name]
    torch.manual_seed(0)
    task, seen = make(), Seen()
    twin = make()
    twin.load_state_dict(task.state_dict())
    with pytest.raises(ValueError, match="batch 1 of training"):
        trainer(callbacks=[seen], limit_val_batches=0).fit(task, data(name, 77), data(name))
    first, second, third = seen.weights
    assert all(map(torch.equal, second, first))
    assert not all(map(torch.equal, third, second))
    # And the others train as they would without it.
    good = Seen()
    first_batch, _, third_batch = data(name)
    kept = DataLoader([first_batch, third_batch], batch_size=None)
    trainer(callbacks=[good], limit_val_batches=0).fit(twin, kept, kept)
    assert all(map(torch.equal, third, good.weights[-1]))


class TestPutOff:
    @pytest.fixture(autouse=True)
    def _as_on_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        put_off(monkeypatch)

    @pytest.mark.parametrize("stage", ["training", "validation", "test"])
    def test_the_first_batch_is_refused_at_once(self, stage: str) -> None:
        seen, run = Seen(), {"training": "fit", "validation": "validate", "test": "test"}[stage]
        wrong, more = data("one mask", 255, 0), [data("one mask")] * (run == "fit")
        with pytest.raises(ValueError, match=f"batch 0 of {stage}, and"):
            getattr(trainer(callbacks=[seen], num_sanity_val_steps=0), run)(TASKS["one mask"][0](), wrong, *more)
        assert (seen.weights, seen.count) == ([], 0)

    @pytest.mark.parametrize("stage", ["training", "validation"])
    def test_before_checkpoint_and_scores(self, stage: str, tmp_path: Path) -> None:
        wrong, good = data("one mask", 255), data("one mask")
        saved = ModelCheckpoint(tmp_path, save_last=True)
        run = trainer(num_sanity_val_steps=0, callbacks=[saved], enable_checkpointing=True)
        with pytest.raises(ValueError, match=f"batch 1 of {stage}"):
            run.fit(TASKS["one mask"][0](), *((wrong, good) if stage == "training" else (good, wrong)))
        assert list(tmp_path.iterdir()) == []

    def test_training_is_refused_at_a_validation_in_mid_epoch(self) -> None:
        seen = Seen()
        run = trainer(callbacks=[seen], val_check_interval=2, num_sanity_val_steps=0)
        with pytest.raises(ValueError, match="batch 1 of training"):
            run.fit(TASKS["one mask"][0](), data("one mask", 255), data("one mask"))
        assert len(seen.weights) == 2

    def test_the_sanity_check(self) -> None:
        with pytest.raises(ValueError, match="batch 1 of validation"):
            trainer().fit(TASKS["one mask"][0](), data("one mask"), data("one mask", 255))

    def test_how_many_batches(self) -> None:
        targets = torch.ones(12, 1, 4, 4)
        targets[5], targets[11] = 255, -4
        with pytest.raises(ValueError, match=r"run from 1 to 255 in batch 1 of test \(one of 2 such batches\), and"):
            trainer().test(TASKS["one mask"][0](), loader(torch.randn(12, 3, 4, 4), targets))

    def test_of_one_run_nothing_is_left_for_the_next(self) -> None:
        class Interrupted(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                if trainer.global_step == 2:
                    raise KeyError("as it happens")

        task, wrong, good = (
            TASKS["one mask"][0](),
            data("one mask", 255),
            data("one mask"),
        )
        with pytest.raises(KeyError, match="as it happens"):
            trainer(callbacks=[Interrupted()]).fit(task, wrong, good)
        trainer().fit(task, good, good)
        with pytest.raises(ValueError, match="batch 1 of test"):
            trainer().test(task, wrong)
        trainer().test(task, good, verbose=False)

    @pytest.mark.parametrize("name", TASKS)
    def test_no_step_waits_for_a_value(self, name: str) -> None:
        """But for the first of each stage and what torchmetrics looks at on a CPU."""
        counts = _reads(name)
        assert counts["training"][1:] == [0, 0]
        looks = name == "two classes"  # at binary predictions, on a CPU but on no other device
        assert counts["validation"][1:] == [looks, looks]

    @pytest.mark.parametrize("only_whole", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16], ids=str)
    def test_no_note_needs_a_value(self, dtype: torch.dtype, only_whole: bool) -> None:
        # The meta device has no values: whatever would wait for a GPU raises there.
        check, targets = TargetCheck("Masks", 1, only_whole, "", ""), torch.ones(4, 1, 8, 8, device="meta").to(dtype)
        for batch_idx in range(2):
            fitting, misfit = check.note(targets, "training", batch_idx)
        assert fitting.shape == targets.shape
        assert misfit.device.type == check.notes(torch.device("meta")).device.type == "meta"

    def test_no_targets(self) -> None:
        targets = torch.ones(0, 1, 4, 4)
        check = TargetCheck("Masks", 1, False, "", "")
        check.require(targets, "training", 0)
        assert not check.note(targets, "training", 0)[1]


def test_at_once_one_look_at_each_batch() -> None:
    assert _reads("three classes") == {"training": [1, 1, 1], "validation": [1, 1, 1]}


def _reads(name: str) -> dict[str, list[int]]:
    """How often each step brings a value to the host."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    make, _ = TASKS[name]
    task, counts = make(), {}
    for stage, step in (("training", "training_step"), ("validation", "validation_step")):
        counts[stage], real = [], getattr(task, step)

        def counted(batch: Any, batch_idx: int, own: list[int] = counts[stage], real: Any = real) -> Any:
            with Reads() as reads:
                result = real(batch, batch_idx)
            own.append(reads.count)
            return result

        setattr(task, step, counted)
    good = data(name)
    trainer(num_sanity_val_steps=0).fit(task, good, good)
    return counts


def test_without_a_trainer_at_once() -> None:
    task = TASKS["three classes"][0]()
    task.log = lambda *_, **__: None
    images, labels = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="Labels run from 0 to 3 in batch 5 of training"):
        task.training_step((images, labels), 5)
    wrapped = Fabric(accelerator="cpu", devices=1).setup(task)
    with pytest.raises(ValueError, match="Labels run from 0 to 3 in batch 6 of training"):
        wrapped.training_step((images, labels), 6)


@pytest.mark.parametrize("labels", [torch.zeros(4, 1), torch.zeros(4, 3), torch.zeros(3), torch.zeros(())], ids=str)
def test_labels_of_another_shape(labels: Tensor) -> None:
    task = TASKS["three classes"][0]()
    with pytest.raises(ValueError, match=r"Labels have shape .*, and 4 images ask for \(4,\)"):
        task.training_step((torch.randn(4, 3, 4, 4), labels.long()), 0)


class TestPredictionsOfNaN:
    """No mask and no class is what was found there: each counts as the worst, so that it never pays."""

    class Broken(nn.Module):
        """Answers with the images' first channels, NaN where they are."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain, self.width = nn.Parameter(torch.ones(())), width

        def forward(self, images: Tensor) -> Tensor:
            return self.gain * images[:, : self.width]

    def test_masks(self) -> None:
        masks = torch.zeros(4, 1, 6, 6)
        masks[:3, :, 2:4, 2:4] = 1
        logits = 2 * masks - 1
        logits[2:, :, 0, 0] = torch.nan  # of a mask, and of an empty one
        (result,) = trainer().validate(SegmentationTask(self.Broken(1)), loader(logits, masks), verbose=False)
        assert result["val/dice"] == result["val/tversky"] == 0.5
        assert result["val/hausdorff"] == pytest.approx(50**0.5 / 2)

    def test_class_of_each_pixel(self) -> None:
        masks = torch.randint(3, (2, 1, 6, 6), generator=torch.Generator().manual_seed(0))
        logits = nn.functional.one_hot(masks[:, 0], 3).movedim(-1, 1).float()
        logits[0, 1, 0, 0] = torch.nan
        task = SegmentationTask(self.Broken(3), num_classes=3, activation="softmax")
        (result,) = trainer().validate(task, loader(logits, masks), verbose=False)
        assert result["val/dice"] == 0.5

    @pytest.mark.parametrize("width", [1, 3])
    def test_classes(self, width: int) -> None:
        labels = torch.tensor([0, 1, 0, 1, 1, 0] if width == 1 else [0, 1, 2, 0, 1, 2])
        logits = 2.0 * labels.unsqueeze(1) - 1 if width == 1 else nn.functional.one_hot(labels, 3).float()
        logits[:3, -1] = torch.nan
        task = ClassificationTask(self.Broken(width), width)
        (result,) = trainer().validate(task, loader(logits, labels, 6), verbose=False)
        assert result["val/accuracy"] == 0.5


def test_several_processes_raise_together() -> None:
    """The same sentence on each, whichever has the batch, and none waits for the others."""
    one, other = run_distributed(meet_wrong_labels)
    assert one == other
    remedy = "and num_classes=1 allows whole numbers from 0 to 1: change num_classes or the labels."
    assert one == {
        "training, later": (3, f"Labels run from 0 to 7 in batch 2 of training on rank 1, {remedy}"),
        "training, first": (0, f"Labels run from -3 to 0 in batch 0 of training on rank 0, {remedy}"),
        "validation, of uneven batches": (
            0,
            f"Labels run from 0 to 2 in batch 1 of validation on rank 0 (one of 2 such batches), {remedy}",
        ),
        "good": (3, None),
        "mixed": (3, None),
    }


def test_refused_on_each_process_by_its_own_rank() -> None:
    check = TargetCheck("Masks", 1, False, "settings", "remedy")
    with patch.object(check, "clear", wraps=check.clear) as cleared:
        check.refuse(torch.zeros(3, 3, 5))
        assert not cleared.called
        notes = torch.zeros(3, 3, 5)
        notes[2, 1] = torch.tensor([1, 7, 4, -1, 0])
        with pytest.raises(ValueError, match="Masks run from -1 to 0 in batch 7 of validation loader 4 on rank 2,"):
            check.refuse(notes)
        assert cleared.called


@pytest.mark.parametrize("is_put_off", [False, True])
@pytest.mark.parametrize("name", ["two classes", "three classes"])
def test_class_probabilities_in_training(name: str, is_put_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixup and CutMix make them; the loss is the cross entropy by hand, in float64."""
    if is_put_off:
        put_off(monkeypatch)
    torch.manual_seed(0)
    task, images = TASKS[name][0](), torch.randn(12, 3, 4, 4)
    if name == "two classes":
        labels = torch.rand(12)
        full = torch.stack([1 - labels, labels], dim=1)
    else:
        labels = full = torch.rand(12, 3).softmax(dim=1)
    logits = task(images).detach().double()
    if name == "two classes":
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    expected = -(full.double() * logits.log_softmax(dim=1)).sum(dim=1).mean()
    run = trainer(num_sanity_val_steps=0, max_epochs=1)
    run.fit(task, loader(images, labels, batch_size=12), data(name))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-6)

    for wrong, message in ((1.25, r"run from .* to 1.25 in batch 1 of training"), (torch.nan, "hold NaN in batch 1")):
        targets = labels.clone()
        targets.view(-1)[-1] = wrong
        with pytest.raises(ValueError, match=f"Labels {message}"):
            trainer(num_sanity_val_steps=0).fit(TASKS[name][0](), loader(images, targets, batch_size=6), data(name))
    with pytest.raises((ValueError, TypeError), match=r"Labels (have shape|are not whole|are torch.float32)"):
        trainer().validate(task, loader(images, labels), verbose=False)


MULTI_HOT, NO_CLASS = [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]


@pytest.mark.parametrize("is_put_off", [False, True])
@pytest.mark.parametrize("wrong", [MULTI_HOT, NO_CLASS, [0.4, 0.3, 0.2], [0.5, 0.5, 0.04]], ids=str)
def test_class_probabilities_add_up_to_one(
    wrong: list[float], is_put_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_put_off:
        put_off(monkeypatch)
    labels = torch.eye(3)[torch.arange(12) % 3]
    labels[-1] = torch.tensor(wrong)
    low, high = sorted([1.0, sum(wrong)])
    seen = Seen()
    with pytest.raises(
        ValueError,
        match=f"Sums of class probabilities run from {low:g} to {high:g} in batch 1 of training, and .* must be 1: div",
    ):
        trainer(num_sanity_val_steps=0, callbacks=[seen]).fit(
            TASKS["three classes"][0](), loader(torch.randn(12, 3, 4, 4), labels, batch_size=6), data("three classes")
        )
    assert len(seen.weights) == 1 + is_put_off
    if is_put_off:  # the wrong batch trained nothing
        assert all(map(torch.equal, *seen.weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sums_that_are_one_up_to_rounding(dtype: torch.dtype) -> None:
    """Of a softmax, Mixup, CutMix and label smoothing, computed in the type of the labels."""
    classes, generator = 1000, torch.Generator().manual_seed(0)
    task = ClassificationTask(nn.Sequential(nn.Flatten(), nn.Linear(12, classes)), classes, optimizer=sgd)
    task.log = lambda *_, **__: None
    hard = torch.eye(classes, dtype=dtype)[torch.randint(classes, (64,), generator=generator)]
    soft = torch.randn(64, classes, generator=generator).to(dtype).softmax(dim=1)
    for share in (0.3, 0.07, 0.5123):
        mixed = share * soft + (1 - share) * soft.roll(1, 0)
        cut = torch.tensor(share, dtype=dtype) * hard + (1 - torch.tensor(share, dtype=dtype)) * hard.roll(1, 0)
        smooth = [(1 - share) * labels + share / classes for labels in (cut, mixed)]
        for labels in (hard, soft, mixed, cut, *smooth):
            task.training_step((torch.randn(64, 3, 2, 2, generator=generator), labels), 0)


def test_a_sum_is_no_matter_with_one_logit() -> None:
    task = TASKS["two classes"][0]()
    task.log = lambda *_, **__: None
    task.training_step((torch.randn(4, 3, 4, 4), torch.tensor([0.0, 0.2, 0.3, 0.0])), 0)


def test_checks_of_class_probabilities_need_no_value() -> None:
    # The meta device has no values: whatever would wait for a GPU raises there.
    for check in ClassificationTask(nn.Linear(4, 3), 3).target_checks[1:]:
        labels, misfit = check.note(torch.ones(4, 3, device="meta"), "training", 0)
        assert labels.shape == (4, 3)
        assert misfit.device.type == "meta"


def test_class_probabilities_of_another_shape() -> None:
    task = TASKS["three classes"][0]()
    with pytest.raises(ValueError, match=r"Class probabilities have shape \(4, 2\), and .* ask for \(4, 3\)"):
        task.training_step((torch.randn(4, 3, 4, 4), torch.rand(4, 2)), 0)


def test_masks_of_more_classes_than_their_type_tells_apart() -> None:
    """As Lightning makes of float masks under bf16-true: 257 would be 256."""
    task = SegmentationTask(nn.Conv2d(3, 258, 1), num_classes=258, activation="softmax", optimizer=sgd)
    task.log = lambda *_, **__: None
    images, masks = torch.randn(2, 3, 4, 4), torch.full((2, 1, 4, 4), 257.0)
    with pytest.raises(TypeError, match=r"bfloat16, which cannot tell all classes from 0 to 257 apart: pass masks.lon"):
        task.training_step((images, masks.bfloat16()), 0)
    assert torch.equal(task.training_step((images, masks.half()), 0), task.training_step((images, masks.long()), 0))
