"""Trains a small network with ZNorm in two processes and writes down every weight. Run by test_ddp.py.

python ddp_training.py DIRECTORY STRATEGY SCENARIO [SCENARIO ...]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import ZNormCallback

PROCESSES = 2
BATCH_SIZE = 4  # of each process
STEPS = 3
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Scenario:
    """What is special about a run."""

    precision: Any = "64-true"
    options: dict[str, Any] = field(default_factory=dict)
    """Of DistributedDataParallel."""
    accumulate: int = 1
    fused: bool = False
    manual: bool = False
    partly_used: bool = False
    """One parameter is used by the second process alone, and one by none."""
    overflowing_batch: int | None = None
    """Batch in which the second process' gradients, and no other's, become infinite."""


SCENARIOS = {
    "default": Scenario(),
    "float32": Scenario("32-true"),
    "bucket_view": Scenario(options={"gradient_as_bucket_view": True}),
    "static_graph": Scenario(options={"static_graph": True}),
    "static_graph_bucket_view": Scenario(options={"static_graph": True, "gradient_as_bucket_view": True}),
    "find_unused": Scenario(options={"find_unused_parameters": True}, partly_used=True),
    "find_unused_bucket_view": Scenario(
        options={"find_unused_parameters": True, "gradient_as_bucket_view": True}, partly_used=True
    ),
    "small_buckets": Scenario(options={"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True}),
    "accumulate": Scenario(accumulate=2),
    "accumulate_bucket_view": Scenario(accumulate=2, options={"gradient_as_bucket_view": True}),
    "accumulate_find_unused": Scenario(accumulate=2, options={"find_unused_parameters": True}, partly_used=True),
    "manual": Scenario(manual=True),
    "bf16_mixed": Scenario("bf16-mixed"),
    "fp16_mixed": Scenario("16-mixed", overflowing_batch=1),
    "fp16_mixed_bucket_view": Scenario("16-mixed", overflowing_batch=1, options={"gradient_as_bucket_view": True}),
    "fp16_mixed_accumulate": Scenario("16-mixed", overflowing_batch=2, accumulate=2),
    "fp16_mixed_fused": Scenario("16-mixed", overflowing_batch=1, fused=True),
    "fp16_mixed_manual": Scenario("16-mixed", overflowing_batch=1, manual=True),
}


class Network(nn.Module):
    """A convolution (channels last), a linear layer and a single number."""

    def __init__(self, partly_used: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(36, 5)
        self.gain = nn.Parameter(torch.ones(()))
        if partly_used:
            self.of_second_process = nn.Parameter(torch.randn(5))
            self.of_no_process = nn.Parameter(torch.randn(5))

    def loss(self, images: Tensor, labels: Tensor, rank: int) -> Tensor:
        logits = self.linear(self.conv(images).tanh().flatten(1)) * self.gain
        if hasattr(self, "of_second_process") and rank == 1:
            logits = logits + self.of_second_process.sin()
        return F.cross_entropy(logits, labels)


def batch_of(scenario: Scenario, number: int, rank: int) -> tuple[Tensor, Tensor]:
    """The images and labels of one batch of one process."""
    generator = torch.Generator().manual_seed(number * PROCESSES + rank)
    dtype = torch.float64 if scenario.precision == "64-true" else torch.float32
    images = torch.randn(BATCH_SIZE, 3, 5, 5, generator=generator, dtype=dtype)
    return images, torch.randint(5, (BATCH_SIZE,), generator=generator)


class Training(LightningModule):
    def __init__(self, name: str, directory: Path) -> None:
        super().__init__()
        self.name, self.directory = name, directory
        self.scenario = SCENARIOS[name]
        self.automatic_optimization = not self.scenario.manual
        self.network = Network(self.scenario.partly_used)
        self.weights: list[dict[str, Tensor]] = []
        self.scales: list[float] = []
        self.storages: list[int] = []
        self.moved_grads: list[str] = []

    def training_step(self, number: Tensor) -> Tensor:
        images, labels = batch_of(self.scenario, int(number), self.global_rank)
        loss = self.network.loss(images, labels, self.global_rank)
        if number == self.scenario.overflowing_batch and self.global_rank == 1:
            loss = loss * 1e38
        if self.scenario.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=LEARNING_RATE, fused=self.scenario.fused)

    def grads(self) -> dict[str, Tensor]:
        return {name: param.grad for name, param in self.network.named_parameters() if param.grad is not None}

    def on_after_backward(self) -> None:
        self.places = {name: grad.data_ptr() for name, grad in self.grads().items()}

    # Lightning calls the callbacks' hook before the module's.
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.moved_grads += [name for name, grad in self.grads().items() if grad.data_ptr() != self.places[name]]
        self.storages.append(len({grad.untyped_storage().data_ptr() for grad in self.grads().values()}))

    def on_train_start(self) -> None:
        self.write_down()

    def on_train_batch_end(self, *_: Any) -> None:
        self.write_down()

    def write_down(self) -> None:
        self.weights.append({name: param.detach().clone() for name, param in self.network.named_parameters()})
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.scales.append(1.0 if scaler is None else scaler.get_scale())

    def on_train_end(self) -> None:
        file = self.directory / f"{self.name}-{self.global_rank}.pt"
        torch.save({key: getattr(self, key) for key in ("weights", "scales", "storages", "moved_grads")}, file)


def train(name: str, strategy: str, directory: Path) -> None:
    scenario = SCENARIOS[name]
    # On a CPU, Lightning makes bf16-mixed of the string "16-mixed".
    fp16 = scenario.precision == "16-mixed"
    trainer = Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=strategy if not scenario.options else DDPStrategy(**scenario.options),
        precision=None if fp16 else scenario.precision,
        plugins=[MixedPrecision("16-mixed", "cpu")] if fp16 else None,
        accumulate_grad_batches=scenario.accumulate,
        use_distributed_sampler=False,  # each process gets all numbers of batches, and makes its own images
        max_epochs=1,
        callbacks=[ZNormCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Training(name, directory), DataLoader(range(STEPS * scenario.accumulate)))


def main(directory: str, strategy: str, names: Sequence[str]) -> None:
    for name in names:
        train(name, strategy, Path(directory))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
