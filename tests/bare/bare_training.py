"""Train with the gradient callbacks, and by hand, with Lightning alone; print what was imported and said, as JSON."""

import importlib.metadata
import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

looked_up: list[str] = []


def watch(owner: Any, name: str) -> None:
    """Note look-ups of packages' versions that come from this package."""
    original = getattr(owner, name)

    def watched(*args: Any) -> Any:
        if any("lightning_znorm" in frame.filename for frame in traceback.extract_stack()):
            looked_up.append(str(args[-1]))
        return original(*args)

    setattr(owner, name, watched)


for function in ("version", "distribution", "metadata", "requires"):
    watch(importlib.metadata, function)

from lightning_znorm import (  # noqa: E402
    GradientCentralizationCallback,
    GradientMonitor,
    GradientTransform,
    SINGCallback,
    ZNormCallback,
)
from lightning_znorm.functional import attach, zscore_grads_  # noqa: E402
from lightning_znorm.gradients import AffineMethod  # noqa: E402

LR = 0.5


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


class Half(AffineMethod):
    """g / 2"""

    def affine(self, stats: Any) -> Any:
        return None, torch.full_like(stats.mean, 0.5)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator))


def trained(folder: Path, *callbacks: Any, steps: int = 1) -> Regression:
    model = Regression()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(data(), batch_size=8))
    return model


def by_hand(change: Any) -> Regression:
    """Take one step of SGD, with changed gradients."""
    model = Regression()
    model.training_step(data().tensors, 0).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= LR * change(parameter.grad)
    return model


def attached(method: Any) -> Regression:
    model = Regression()
    optimizer = model.configure_optimizers()
    attach(optimizer, method)
    model.training_step(data().tensors, 0).backward()
    optimizer.step()
    return model


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((left - right).abs().max()) for left, right in pairs)


def zscore(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient - gradient.mean()) / (gradient.std(correction=0) + 1e-10)


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


if __name__ == "__main__":
    root = Path(sys.argv[1])
    said = Said()
    logging.getLogger("lightning.pytorch").addHandler(said)
    expected = by_hand(zscore)
    differences = {
        "ZNormCallback": difference(trained(root / "znorm", ZNormCallback()), expected),
        "attach": difference(attached(None), expected),
        "own method": difference(trained(root / "own", GradientTransform(Half())), by_hand(lambda grad: grad / 2)),
        "own method, attached": difference(attached(Half()), by_hand(lambda grad: grad / 2)),
        "moved": difference(expected, Regression()),
    }
    trained(root / "others", SINGCallback(include="*weight"), GradientCentralizationCallback(exclude="*weight"))
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 3.0])
    zscore_grads_([weight])
    differences["zscore_grads_"] = float((weight.grad - torch.tensor([-1.0, 1.0])).abs().max())
    said.messages.clear()
    trained(root / "monitored", ZNormCallback(), GradientMonitor(), steps=3)
    (table,) = (root / "monitored").rglob("metrics.csv")
    json.dump(
        {
            "differences": differences,
            "said": [message for message in said.messages if "GradientMonitor" in message],
            "logged": table.read_text().splitlines()[0].split(","),
            "pictures": sorted(path.name for path in (root / "monitored").rglob("*.png")),
            "looked_up": looked_up,
            "imported": sorted({name.partition(".")[0] for name, module in sys.modules.items() if module is not None}),
            "version": importlib.metadata.version("lightning-znorm"),
        },
        sys.stdout,
    )
