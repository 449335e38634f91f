"""What a command costs before its first batch: seconds and memory of imports, help, and the start of ``fit``.

Each row is a process of its own. The rows take turns, and the medians over all rounds are printed: the time that
passes, the time that the processor works, and the peak of the memory. ``--against`` measures another checkout of the
repository, in turn with this one:

    python -m benchmarks.startup --rounds 5
    python -m benchmarks.startup --against ../other-checkout
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch", "lightning", "jsonargparse", "torchmetrics", "torchvision", "transformers", "scikit-learn")

# In a folder of its own: ends a training at its first batch.
STOP = """\
import os
from lightning.pytorch import Callback

class Stop(Callback):
    def on_train_batch_start(self, *args):
        os._exit(0)
"""
# What `fit` of configs/digits/resnet20.yaml trains, as a user of LightningCLI would write it.
BARE = """\
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from stop import Stop
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.models import resnet20

class Model(LightningModule):
    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.model = resnet20(num_classes=num_classes, in_chans=1)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

class Data(LightningDataModule):
    def train_dataloader(self):
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
        return DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64)

LightningCLI(Model, Data, trainer_defaults={"callbacks": [Stop()], "logger": False})
"""
COMMAND = ("-m", "lightning_znorm")
FIT = (*COMMAND, "fit", "--config", "configs/digits/resnet20.yaml", "--config", "configs/methods/znorm.yaml")
PLUGIN = "import lightning.pytorch, lightning_znorm; lightning_znorm.ZNormCallback()"
ROWS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "torch": ("`import torch`", ("-c", "import torch")),
    "lightning": ("`import lightning.pytorch`", ("-c", "import lightning.pytorch")),
    "lightning-cli": ("`import lightning.pytorch.cli`", ("-c", "import lightning.pytorch.cli")),
    "plugin": ("`import lightning.pytorch`, and `ZNormCallback()`", ("-c", PLUGIN)),
    "help": ("`--help`", (*COMMAND, "--help")),
    "fit-help": ("`fit --help`", (*COMMAND, "fit", "--help")),
    "fit-help-all": ("`fit --help_all`", (*COMMAND, "fit", "--help_all")),
    "fit": (
        "`fit`, until the first batch",
        (*FIT, "--trainer.accelerator", "cpu", "--trainer.callbacks+", "stop.Stop"),
    ),
    "bare-help": ("a LightningCLI program, `fit --help`", ("bare.py", "fit", "--help")),
    "bare": (
        "a LightningCLI program, `fit` until the first batch",
        ("bare.py", "fit", "--trainer.accelerator", "cpu"),
    ),
}


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    cpu_seconds: float
    megabytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout, measured before this one")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="default: all")
    options = parser.parse_args()
    checkouts = {"before": options.against.resolve()} if options.against else {}
    checkouts["now" if checkouts else ""] = REPOSITORY
    costs: dict[tuple[str, str], list[Cost]] = {}
    for number in range(options.rounds + 1):
        for row in options.rows:
            for label, checkout in checkouts.items():
                cost = measured(ROWS[row][1], checkout)
                if cost and number:  # the first round reads files that are not in memory yet
                    costs.setdefault((row, label), []).append(cost)
    print(f"python {platform.python_version()}, {', '.join(filter(None, map(installed, PACKAGES)))}; ", end="")
    print(f"{options.rounds} rounds, load {os.getloadavg()[0]:.1f} at the end")
    print()
    units = ("seconds", "CPU seconds", "MB")
    names = [f"{unit}, {label}" if label else unit for unit in units for label in checkouts]
    print(f"| what | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
    for row in options.rows:
        cells = []
        for field, digits in (("seconds", 2), ("cpu_seconds", 2), ("megabytes", 0)):
            for label in checkouts:
                values = [getattr(cost, field) for cost in costs.get((row, label), [])]
                cells.append(f"{statistics.median(values):.{digits}f}" if values else "-")
        print(f"| {ROWS[row][0]} | {' | '.join(cells)} |")


def measured(arguments: tuple[str, ...], checkout: Path) -> Cost | None:
    """Run Python with arguments in an empty folder, and return what it took; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "stop.py").write_text(STOP)
        Path(folder, "bare.py").write_text(BARE)
        environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{folder}"}
        with Path(folder, "log.txt").open("wb") as log:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    cost = Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)
    return None if process.returncode else cost


def installed(package: str) -> str:
    """Return a package with its version; empty if it is not installed."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
