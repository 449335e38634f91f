"""How large SGD's steps may be under ZNorm and SING: ``python -m benchmarks.sgd_steps``.

It trains networks on the digits with SGD. Each learning rate is chosen so that steps have a given size compared to the
weights that they move (``lightning_znorm.gradients.step_sizes``), and the validation accuracy is printed. Above which
size training suffers is what ``ZNormCallback`` and ``attach`` warn of.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.optim import SGD

from lightning_znorm import GradientTransform
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.gradients import SING, AffineMethod, ZScore
from lightning_znorm.gradients.slots import ParameterSlot
from lightning_znorm.gradients.step_sizes import effective_rate, relative_steps
from lightning_znorm.models import resnet20
from lightning_znorm.tasks import ClassificationTask

SIZES = [0.01, 0.03, 0.1, 0.3, 0.5, 1, 3]
METHODS: dict[str, AffineMethod] = {"ZNorm": ZScore(), "SING": SING()}


class Attention(nn.Module):
    """A small vision transformer: each row of an 8 x 8 image is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(0.02 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.blocks(self.embed(images.flatten(1, 2)) + self.position).mean(1))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-20": partial(resnet20, num_classes=10, in_chans=1),
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    "transformer": Attention,
}


def accuracy(network: str, method: str, momentum: float, size: float, epochs: int, seed: int) -> tuple[float, float]:
    """Return the learning rate at which steps have a size, and the validation accuracy after training with it."""
    seed_everything(seed, verbose=False)
    model = NETWORKS[network]()
    slots = [ParameterSlot((name,), parameter) for name, parameter in model.named_parameters()]
    (at_rate_one,) = relative_steps([slots], METHODS[method])
    rate = size / (at_rate_one * effective_rate({"lr": 1.0, "momentum": momentum}))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[GradientTransform(METHODS[method])],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        ClassificationTask(model, num_classes=10, optimizer=partial(SGD, lr=rate, momentum=momentum)),
        DigitsDataModule(seed=seed),
    )
    return rate, float(trainer.callback_metrics["val/accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Validation accuracy over the size of SGD's steps.")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run (default: 6)")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="sizes of steps over those of weights")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="networks")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each mean (default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # about unused workers, and the sizes that are studied
    torch.set_num_threads(args.threads)

    print(f"Digits, {args.epochs} epochs of SGD, mean validation accuracy of seeds {args.seeds}\n")
    print(f"| {'network':11} | {'method':6} | momentum | step / weight | {'lr':>7} | accuracy |")
    print(f"| {'-' * 11} | {'-' * 6} | {'-' * 7}: | {'-' * 12}: | {'-' * 6}: | {'-' * 7}: |")
    for network in args.networks:
        for method in args.methods:
            for momentum in (0.0, 0.9):
                for size in args.sizes:
                    runs = [accuracy(network, method, momentum, size, args.epochs, seed) for seed in args.seeds]
                    rate, mean = (statistics.mean(column) for column in zip(*runs, strict=True))
                    cells = f"{momentum:8g} | {size:13g} | {rate:7.1e} | {mean:8.3f}"
                    print(f"| {network:11} | {method:6} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
