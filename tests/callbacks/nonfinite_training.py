"""Trains in two processes until a gradient is NaN, in the part of one of them. Called by test_nonfinite.py."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_znorm import ZNormCallback
from lightning_znorm.gradients import NonFiniteGradientError
from tests.strategies.strategies import CPUFSDPStrategy


class Spoiled(LightningModule):
    """Whose last row has a gradient of NaN at the second step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(7, 7, bias=False)
        self.batches = 0
        self.before: list[Tensor] = []
        self.sees_it = False
        self.unchanged = False

    @property
    def own(self) -> list[Tensor]:
        """What this process holds of the parameters."""
        return [getattr(p.data, "_local_tensor", p.data).clone() for p in self.trainer.model.parameters()]

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.own

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        factors = torch.tensor([1.0] * 6 + [torch.nan if batch_idx == 1 else 1.0])
        return (self.net(batch) * factors).square().sum(1).mean()

    def on_after_backward(self) -> None:
        grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self.sees_it = any(bool(getattr(grad, "_local_tensor", grad).isnan().any()) for grad in grads)

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trainer.model.parameters(), lr=0.1)


class Witness(Callback):
    """Looks at the parameters before they are taken down."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, Spoiled)
        pl_module.unchanged = len(pl_module.before) > 0 and all(map(torch.equal, pl_module.own, pl_module.before))


def train(name: str) -> dict[str, Any]:
    """Return what one of two processes sees of a training with this strategy."""
    strategies: dict[str, str | Strategy] = {"fsdp": CPUFSDPStrategy(), "fsdp2": ModelParallelStrategy(2, 1)}
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies.get(name, name),
        max_epochs=1,
        callbacks=[ZNormCallback(allow_untested_strategy=True, error_if_nonfinite=True), Witness()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Spoiled()
    with pytest.raises(NonFiniteGradientError) as caught:
        trainer.fit(module, DataLoader(torch.randn(8, 7), batch_size=1))
    return {
        "message": str(caught.value),
        "batches": module.batches,
        "unchanged": module.unchanged,
        "sees it": module.sees_it,
    }
