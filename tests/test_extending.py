"""What docs/architecture.md says one must touch to add something, done here for one of each kind."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_znorm import GradientTransform, ZNormCallback
from lightning_znorm.callbacks import strategies
from lightning_znorm.callbacks.strategies import Support
from lightning_znorm.cli import main
from lightning_znorm.data.base import InMemoryDataModule
from lightning_znorm.data.datasets import Images, Labels
from lightning_znorm.gradients import AffineMethod, Statistics
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.gradients.slots import GradientSlot
from lightning_znorm.metrics.mask_metric import MaskMetric

LR = 0.1
INPUTS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]])


class Module(LightningModule):
    """One linear layer and one step on two inputs."""

    def __init__(self, make_optimizer: Callable[[Any], Optimizer] = lambda params: torch.optim.SGD(params, LR)) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layer = nn.Linear(3, 2, bias=False)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layer(batch).square().sum()

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


def one_step(module: Module, callback: GradientTransform, **options: Any) -> tuple[Tensor, Tensor]:
    """Train for one step; return the weight's change over the learning rate, and its gradient by hand in float64."""
    before = module.layer.weight.detach().double().clone().requires_grad_()
    (INPUTS.double() @ before.T).square().sum().backward()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(INPUTS, batch_size=2))
    assert before.grad is not None
    return (before.detach() - module.layer.weight.detach()) / LR, before.grad


class HalfCentred(AffineMethod):
    """A method: a class in gradients/methods.py."""

    over = "row"

    def affine(self, stats: Statistics) -> tuple[Tensor, Tensor]:
        return stats.mean / 2, 3 * stats.std


class HalfCentredCallback(GradientTransform):
    """Its callback: a class in callbacks/methods.py."""

    def __init__(self) -> None:
        super().__init__(HalfCentred())


def test_a_method() -> None:
    change, grad = one_step(Module(), HalfCentredCallback())
    expected = (grad - grad.mean(1, keepdim=True) / 2) * 3 * grad.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)


class StashingStrategy(SingleDeviceStrategy):
    """A strategy that keeps gradients in a place of its own, from where its optimizer takes them."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.stash: dict[Tensor, Tensor] = {}

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            assert parameter.grad is not None
            self.stash[parameter], parameter.grad = parameter.grad, None


class StashSlot(GradientSlot):
    """Where that strategy keeps the gradient of a parameter."""

    def __init__(self, name: str, parameter: Tensor, stash: dict[Tensor, Tensor]) -> None:
        super().__init__((name,))
        self.parameter, self.stash = parameter, stash

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def read(self) -> Tensor | None:
        return self.stash.get(self.parameter)

    def clear(self) -> None:
        self.stash.pop(self.parameter, None)


class StashAdapter(GradientAdapter):
    """A strategy's adapter: a file in gradients/adapters/, and a row in callbacks/strategies.py."""

    def __init__(self, module: LightningModule, strategy: StashingStrategy) -> None:
        super().__init__(module)
        named = module.named_parameters()
        self._slots = {parameter: StashSlot(name, parameter, strategy.stash) for name, parameter in named}

    def slots(self) -> Iterator[GradientSlot]:
        yield from self._slots.values()

    def slots_of(self, optimizer: Optimizer) -> Iterator[GradientSlot]:
        yield from (self._slots[parameter] for group in optimizer.param_groups for parameter in group["params"])


def stash_module(strategy: StashingStrategy) -> Module:
    class StashSGD(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(strategy.stash.pop(parameter), alpha=LR)
            return loss

    return Module(lambda params: StashSGD(params, LR))


def test_a_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = StashingStrategy()
    with pytest.raises(MisconfigurationException, match="has not been tested with StashingStrategy"):
        one_step(stash_module(strategy), ZNormCallback(), strategy=strategy)
    support = Support(StashAdapter, shards_gradients=False, packages=(__name__,))
    monkeypatch.setitem(strategies.SUPPORTED, "StashingStrategy", support)
    strategy = StashingStrategy()
    change, grad = one_step(stash_module(strategy), ZNormCallback(), strategy=strategy)
    torch.testing.assert_close(change, (grad - grad.mean()) / grad.std(correction=0), rtol=1e-5, atol=1e-6)


class StripesDataModule(InMemoryDataModule):
    """A data set: a file in data/, its name in data/__init__.py, and an experiment in configs/."""

    num_classes = 2
    max_value = 255
    mean, std = (0.5,), (0.5,)

    def __init__(self, batch_size: int = 20, val_fraction: float = 0.25, seed: int = 0) -> None:
        super().__init__(batch_size, val_fraction, seed)
        self.save_hyperparameters()

    def load(self, train: bool) -> tuple[Images, Labels]:
        draws = np.random.default_rng(0 if train else 1)
        labels = draws.integers(0, 2, 160).astype(np.int64)
        stripes = np.broadcast_to(255 * draws.integers(0, 2, (160, 1, 8, 1)), (160, 1, 8, 8)).astype(np.uint8)
        return np.where(labels[:, None, None, None] == 1, stripes, stripes.swapaxes(2, 3)), labels


EXPERIMENT = """
seed_everything: 0
model:
  class_path: ClassificationTask
  init_args:
    model: resnet20
    num_classes: 2
    in_chans: 1
data:
  class_path: tests.test_extending.StripesDataModule
trainer:
  accelerator: cpu
  max_epochs: 4
  enable_progress_bar: false
  log_every_n_steps: 2
  logger:
    class_path: CSVLogger
    init_args:
      save_dir: logs
      name: stripes
  callbacks+:
    - class_path: LastCheckpoint
"""


def test_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stripes.yaml").write_text(EXPERIMENT)
    files = ["--config", "stripes.yaml", "--config", "configs/methods/znorm.yaml"]
    main(["fit", *files])
    main(["test", *files, "--ckpt_path", str(next(tmp_path.rglob("last.ckpt")))])
    logged = [row for path in tmp_path.rglob("metrics.csv") for row in csv.DictReader(path.read_text().splitlines())]
    assert [float(row["test/accuracy"]) for row in logged if row.get("test/accuracy")][-1] > 0.9


class JaccardIndex(MaskMetric):
    """A metric: a file in metrics/, and its name in metrics/__init__.py."""

    higher_is_better = True

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(threshold, **kwargs)

    def scores(self, preds: Tensor, target: Tensor) -> Tensor:
        preds, target = preds.flatten(1), target.flatten(1)
        return (preds & target).sum(-1) / (preds | target).sum(-1)

    def worst(self, size: Any) -> float:
        return 0.0


def test_a_metric() -> None:
    preds, target = (torch.rand(4, 2, 6, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    target = target > 0.6
    preds[0, 0], target[0, 0] = 0, False  # two empty masks, which are left out
    target[1, 1] = False  # one empty mask, which is the worst
    metric = JaccardIndex()
    value = metric(preds, target)
    each = [
        float((p & t).sum() / (p | t).sum())
        for p, t in zip((preds >= 0.5).flatten(0, 1), target.flatten(0, 1), strict=True)
        if (p | t).any()
    ]
    assert (len(each), int(metric.counted), int(metric.skipped)) == (7, 7, 1)
    assert float(value) == pytest.approx(sum(each) / len(each), rel=1e-6)
