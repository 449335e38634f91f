"""A user's own LightningModule, data module and logger, named in YAML by class path."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class OwnData(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(16, 3, generator=generator)
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class OwnModule(LightningModule):
    def __init__(self, lr: float = 0.1, fault: str = "") -> None:
        super().__init__()
        self.lr = lr
        self.fault = fault
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.fault == "raises":
            raise ValueError("a mistake of the user's own")
        if self.fault == "misuses Lightning":
            self.log("loss", "a mistake of the user's own")
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"y": self.layer(batch[0])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def load_weights_of_another(module: OwnModule, stage: str) -> None:
    """A user's mistake in a hook."""
    module.layer.load_state_dict({})


class OwnLogger(Logger):
    """A logger with one folder for the files of all runs, like those for Weights & Biases and MLflow."""

    def __init__(self, version: int | str | None, save_dir: str | None, name: str | None = "project") -> None:
        super().__init__()
        self._values = version, save_dir, name

    version = property(lambda self: self._values[0])
    save_dir = property(lambda self: self._values[1])
    name = property(lambda self: self._values[2])

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: object) -> None: ...
