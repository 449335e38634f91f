"""ZNorm with Lightning Fabric: two processes on the CPU, by DDP and by FSDP2.

Fabric has no callbacks like the Trainer's; the loop is yours. Call ``attach(optimizer)`` before Fabric wraps the
optimizer. Each step then normalizes the gradients: DDP's averages, or FSDP2's shards with the statistics of whole
gradients.

    python examples/fabric.py

On a CPU, FSDP2 needs a newer torch than 2.6.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_znorm.functional import attach


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh["data_parallel"])


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "DDP": DDPStrategy,
    "FSDP2": lambda: ModelParallelStrategy(sharded, data_parallel_size=2, tensor_parallel_size=1),
}


def train(fabric: Fabric, name: str) -> None:
    fabric.seed_everything(0)
    pixels, digits = load_digits(return_X_y=True)
    data = TensorDataset(torch.as_tensor(pixels / 16, dtype=torch.float32), torch.as_tensor(digits))
    train_set, test_set = random_split(data, [0.8, 0.2])
    loader = fabric.setup_dataloaders(DataLoader(train_set, batch_size=32, shuffle=True))

    model = fabric.setup_module(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(optimizer)
    optimizer = fabric.setup_optimizers(optimizer)
    for epoch in range(20):
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(images), labels))
            optimizer.step()

    images, labels = test_set[:]
    accuracy = (model(images).argmax(dim=1) == labels).float().mean()
    print(f"{name}, process {fabric.global_rank} of {fabric.world_size}: test accuracy {accuracy:.3f}", flush=True)


def main() -> None:
    for name, strategy in STRATEGIES.items():
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy())
        fabric.launch(train, name)


if __name__ == "__main__":
    main()
