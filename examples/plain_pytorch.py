"""ZNorm in a training loop without Lightning, in three ways.

1. Call ``zscore_grads_`` between ``backward()`` and ``step()``, as you would call ``clip_grad_norm_``.
2. Call ``attach(optimizer)`` once, if you do not want to change the loop.
3. Do the same under automatic mixed precision: the z-score is that of the true gradients, not of the scaled ones, and a
   step with infinite gradients is still skipped.

The program only needs ``lightning_znorm.functional``, which imports nothing but torch.

    python examples/plain_pytorch.py
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lightning_znorm.functional import attach, zscore_grads_

EPOCHS = 20


def call_before_each_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for batch, targets in batches(images, labels):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        zscore_grads_(model.parameters())
        optimizer.step()


def attach_to_the_optimizer(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    znorm = attach(optimizer)
    for batch, targets in batches(images, labels):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()
    znorm.remove()  # later steps use the gradients as they are


def attach_under_mixed_precision(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(optimizer)
    scaler = torch.amp.GradScaler(images.device.type)
    for batch, targets in batches(images, labels):
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.float16):
            loss = F.cross_entropy(model(batch), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def batches(images: Tensor, labels: Tensor, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels)).split(size):
            yield images[chosen], labels[chosen]


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, digits, test_size=0.2, stratify=digits, random_state=0)
    train_images, test_images = (torch.as_tensor(images, dtype=torch.float32) for images in split[:2])
    train_labels, test_labels = map(torch.as_tensor, split[2:])
    for train in (call_before_each_step, attach_to_the_optimizer, attach_under_mixed_precision):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        train(model, train_images, train_labels)
        accuracy = (model(test_images).argmax(dim=1) == test_labels).float().mean()
        print(f"{train.__name__}: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
