"""Learning rates with and without ZNorm, under Adam and SGD: ``python -m benchmarks.learning_rates``.

It trains the ResNet-20 of the digits experiment briefly at each rate, and prints the validation accuracy. This shows
the usable range of rates; it does not show the best accuracy.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_znorm import ZNormCallback
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.tasks import ClassificationTask

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], list[float]]] = {
    "Adam": (Adam, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
    "SGD, momentum 0.9": (partial(SGD, momentum=0.9), [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
}


def accuracy(optimizer: Callable[[Iterable[nn.Parameter]], Optimizer], znorm: bool, epochs: int, seed: int) -> float:
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[ZNormCallback()] if znorm else [],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    task = ClassificationTask("resnet20", num_classes=10, in_chans=1, optimizer=optimizer)
    trainer.fit(task, DigitsDataModule(seed=seed))
    return float(trainer.callback_metrics["val/accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Validation accuracy over learning rates, with and without ZNorm.")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of each run (default: 6)")
    parser.add_argument("--rates", type=float, nargs="+", help="rates in place of the default ranges")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of each mean (default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # about unused workers and accelerators
    torch.set_num_threads(args.threads)

    print(f"ResNet-20 on the digits, {args.epochs} epochs, mean validation accuracy of seeds {args.seeds}\n")
    print(f"| {'optimizer':17} | {'lr':>6} | {'plain':>6} | {'ZNorm':>6} |")
    print(f"| {'-' * 17} | {'-' * 5}: | {'-' * 5}: | {'-' * 5}: |")
    for name, (optimizer, rates) in OPTIMIZERS.items():
        for rate in args.rates or rates:
            plain, znorm = (
                statistics.mean(accuracy(partial(optimizer, lr=rate), use, args.epochs, seed) for seed in args.seeds)
                for use in (False, True)
            )
            print(f"| {name:17} | {rate:6.0e} | {plain:6.3f} | {znorm:6.3f} |", flush=True)


if __name__ == "__main__":
    main()
