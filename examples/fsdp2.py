"""ZNorm with FSDP2 in plain PyTorch: two processes on the CPU, each with half of every parameter.

``fully_shard`` gives each process a shard of every gradient. Call ``zscore_grads_`` as for whole gradients: it uses the
mean and deviation of whole gradients, with two small collectives for all gradients together. The step is the same as
that of a single process with twice the batch.

    python examples/fsdp2.py

On a CPU, FSDP2 needs a newer torch than 2.6.

On GPUs, start one process for each GPU with ``torchrun``, initialize "nccl", and make the mesh of "cuda".
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_znorm.functional import zscore_grads_

PROCESSES = 2
EPOCHS = 20


def train(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, digits, test_size=0.2, stratify=digits, random_state=0)
    images, test_images = (torch.as_tensor(images, dtype=torch.float32) for images in split[:2])
    labels, test_labels = map(torch.as_tensor, split[2:])

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    fully_shard(model, mesh=init_device_mesh("cpu", (PROCESSES,)))
    local_weights = sum(parameter.to_local().numel() for parameter in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        # All processes draw the same order, and each takes its share of a batch.
        for chosen in torch.randperm(len(labels)).split(64):
            share = chosen[rank::PROCESSES]
            optimizer.zero_grad()
            F.cross_entropy(model(images[share]), labels[share]).backward()
            zscore_grads_(model.parameters())
            optimizer.step()

    accuracy = (model(test_images).argmax(dim=1) == test_labels).float().mean()
    print(f"process {rank} of {PROCESSES}: holds {local_weights} weights, test accuracy {accuracy:.3f}")
    dist.barrier()  # gloo may abort a process after the other one has ended
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (os.path.join(folder, "store"),), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
