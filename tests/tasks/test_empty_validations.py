"""A validation whose masks are all empty, in prediction and truth, has nothing to score: NaN, and no divergence."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from tests.trainers import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.* is NaN. all .* masks are empty:UserWarning")
NAN = math.nan


class Predicts(nn.Module):
    """Marks as many pixels as said for each validation; 9 of the 16 true ones give a Dice score of 0.72."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.marked = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.full((len(images), 1, 8, 8), -9.0)
        logits.view(len(images), -1)[:, : self.marked] = 9
        return logits * self.gain


def dice(marked: int) -> float:
    return NAN if marked == 0 else 2 * marked / (marked + 16)


class Validations(Callback):
    """Lets each validation find what it is to find; those of 0 pixels have no mask."""

    def __init__(self, marked: Sequence[int]) -> None:
        self.marked = marked
        self.seen: list[float] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.model.marked = self.marked[trainer.current_epoch]

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        batch[1].zero_().view(len(batch[1]), -1)[:, : 16 if pl_module.model.marked else 0] = 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(trainer.callback_metrics["val/dice"].item())


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8)), batch_size=2)


def fit(
    marked: Sequence[int], *callbacks: Callback, task: SegmentationTask | None = None, **kwargs: Any
) -> Validations:
    validations = Validations(marked)
    arguments = {"max_epochs": len(marked), "num_sanity_val_steps": 0, **kwargs}
    run = trainer(callbacks=[validations, *callbacks], **arguments)
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    run.fit(SegmentationTask(Predicts(), **sgd) if task is None else task, loader(), loader())
    return validations


class TestEarlyStopping:
    @pytest.mark.parametrize("marked", [[4, 0, 8, 0, 0, 12], [0, 4, 8], [0, 0, 4], [0, 0, 0]], ids=str)
    def test_goes_on(self, marked: list[int]):
        stopping = EarlyStopping("val/dice", mode="max", patience=3 if any(marked) else 4)
        seen = fit(marked, stopping).seen
        assert seen == pytest.approx([dice(count) for count in marked], nan_ok=True)
        best = max(filter(math.isfinite, seen), default=-math.inf)
        assert stopping.best_score.item() == pytest.approx(best)

    @pytest.mark.parametrize(("metric", "mode"), [("tversky", "max"), ("hausdorff", "min")])
    def test_of_the_other_scores(self, metric: str, mode: str):
        marked = [0, 4, 0, 8]
        stopping = EarlyStopping(f"val/{metric}", mode=mode, patience=2)
        assert len(fit(marked, stopping).seen) == 4
        assert stopping.best_score.isfinite()
        assert stopping.wait_count == 0  # the last was the best

    def test_a_validation_without_masks_is_no_improvement(self):
        stopping = EarlyStopping("val/dice", mode="max", patience=2)
        assert len(fit([4, 0, 0, 8], stopping).seen) == 3
        assert stopping.best_score.item() == pytest.approx(dice(4))

    def test_after_training_it_is_as_it_was(self):
        stopping, other = EarlyStopping("val/dice"), EarlyStopping("val/tversky", check_finite=False)
        seen = []

        class Watch(Callback):
            def on_train_start(self, *_: Any) -> None:
                seen.append((stopping.check_finite, other.check_finite))

        fit([4], stopping, other, Watch())
        assert seen == [(False, False)]
        assert (stopping.check_finite, other.check_finite) == (True, False)

    def test_several_loaders(self):
        stopping = EarlyStopping("val/dice/dataloader_idx_1", mode="max", patience=3)
        run = trainer(max_epochs=2, callbacks=[stopping], num_sanity_val_steps=0)
        run.fit(SegmentationTask(Predicts()), loader(), [loader(), loader()])
        assert run.current_epoch == 2

    def test_a_loss_of_nan_still_stops(self):
        class NoLoss(nn.Module):
            def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
                return logits.sum() * NAN

        stopping = EarlyStopping("val/loss", patience=5)
        task = SegmentationTask(Predicts(), loss=NoLoss(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        assert len(fit([4, 4, 4], stopping, task=task).seen) == 1

    def test_a_classification_is_left_alone(self):
        stopping = EarlyStopping("val/accuracy", mode="max")
        seen = []

        class Watch(Callback):
            def on_train_start(self, *_: Any) -> None:
                seen.append(stopping.check_finite)

        data = DataLoader(TensorDataset(torch.randn(4, 2), torch.arange(4) % 2), batch_size=2)
        trainer(callbacks=[stopping, Watch()]).fit(ClassificationTask(nn.Linear(2, 2), 2), data, data)
        assert seen == [True]


@pytest.mark.parametrize(("metric", "mode", "best"), [("dice", "max", 8), ("hausdorff", "min", 8)])
@pytest.mark.parametrize("marked", [[0, 4, 0, 8, 0], [4, 0, 8, 0], [0, 0, 8]], ids=str)
@pytest.mark.parametrize("save_top_k", [1, 2])
def test_best_checkpoint(tmp_path: Path, metric: str, mode: str, best: int, marked: list[int], save_top_k: int):
    saving = ModelCheckpoint(
        tmp_path, "{epoch}", monitor=f"val/{metric}", mode=mode, save_top_k=save_top_k, auto_insert_metric_name=False
    )
    seen = fit(marked, saving, enable_checkpointing=True).seen
    assert Path(saving.best_model_path).name == f"{marked.index(best)}.ckpt"
    assert saving.best_model_score.isfinite()
    if metric == "dice":
        assert saving.best_model_score.item() == pytest.approx(max(filter(math.isfinite, seen)))


def test_plateau_takes_it_for_no_improvement():
    seen = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            seen.append(optimizer.param_groups[0]["lr"])

    task = SegmentationTask(
        Predicts(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-9),
        lr_scheduler=lambda o: ReduceLROnPlateau(o, "val/dice", mode="max", factor=0.5, patience=1, eps=0),
    )
    fit([0, 4, 0, 8, 0, 0, 8], Rates(), task=task)
    assert [rate / 1e-9 for rate in seen[::2]] == pytest.approx([1, 1, 1, 1, 1, 1, 0.5])
