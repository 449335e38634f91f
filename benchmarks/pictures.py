"""Draw the pictures of the README and of docs/: ``python -m benchmarks.pictures``, in a minute on a CPU.

Some pictures show the committed studies of examples/paper/results and the committed table of learning rates. The others
show short trainings on scikit-learn's digits and on drawn shapes, so no data set is needed. docs/gallery.md shows them
all; a picture that no page shows fails a test.
"""

import argparse
import csv
import logging
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from examples.imbalance.data import RareDigits
from lightning_znorm import GradientMonitor, MaskOverlay, ZNormCallback
from lightning_znorm.compare.plots import SweptValue, forest, plot, plot_sweep
from lightning_znorm.compare.results import mean
from lightning_znorm.compare.statistics import paired_interval
from lightning_znorm.data import MaskFolderDataModule
from lightning_znorm.functional import zscore_grads_
from lightning_znorm.tasks import ClassificationTask, SegmentationTask

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "examples/paper/results"
METHODS = ["baseline", "gc", "znorm", "znorm-weights", "znorm-adaptive"]
RATE = "model.init_args.optimizer.init_args.lr"
LARGEST = 150_000
"""Bytes of a picture; larger ones are stored with fewer colours."""
# Of Okabe and Ito: they differ in grey too. Dashes and markers say the same without colour.
PLAIN: dict[str, Any] = {"color": "#000000", "linestyle": "--", "marker": "o", "markerfacecolor": "white"}
ZNORM: dict[str, Any] = {"color": "#0072B2", "linestyle": "-", "marker": "^", "markerfacecolor": "white"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Pictures:
    """The pictures, each drawn into a folder.

    Args:
        folder: Where to write.
        epochs: Epochs of the trainings; fewer for a quick try.
    """

    def __init__(self, folder: Path, epochs: int | None = None) -> None:
        self.folder = folder
        self.epochs = epochs

    def training(self) -> None:
        """Draw training loss and validation accuracy over epochs, with and without ZNorm, of the digits' study."""
        drawn = {"train/loss": "training loss", "val/accuracy": "validation accuracy"}
        figure, panels = _axes(2, "epoch")
        for axes, (metric, label) in zip(panels, drawn.items(), strict=True):
            for method, name, style in (("baseline", "without", PLAIN), ("znorm", "with ZNormCallback()", ZNORM)):
                by_seed = _curves(STUDIES / "digits-adam", metric, "0.001")[method]
                epochs = sorted(next(iter(by_seed.values())))
                values = [[curve[epoch] for curve in by_seed.values()] for epoch in epochs]
                shown = [epoch + 1 for epoch in epochs]
                axes.fill_between(
                    shown, list(map(min, values)), list(map(max, values)), color=style["color"], alpha=0.15
                )
                axes.plot(shown, list(map(mean, values)), label=name, linewidth=1.8, markersize=5, **style)
            axes.set_ylabel(label)
        panels[0].set_yscale("log")
        panels[0].legend(frameon=False)
        self._save("training", figure)

    def learning_rates(self) -> None:
        """Draw validation accuracy over learning rates: the table that benchmarks/learning_rates.py printed."""
        text = (ROOT / "benchmarks/results/cpu.md").read_text(encoding="utf-8")
        text = text[text.rindex("$ python -m benchmarks.learning_rates") :].partition("```")[0]
        rows = re.findall(r"^\| (Adam|SGD[^|]*?) +\| +(\S+) \| +(\S+) \| +(\S+) \|$", text, flags=re.MULTILINE)
        figure, panels = _axes(2, "learning rate", sharex=False)
        for axes, optimizer in zip(panels, dict.fromkeys(row[0] for row in rows), strict=True):
            rates, plain, znorm = zip(*(map(float, row[1:]) for row in rows if row[0] == optimizer), strict=True)
            axes.plot(rates, plain, label="without", linewidth=1.8, markersize=6, **PLAIN)
            axes.plot(rates, znorm, label="with ZNorm", linewidth=1.8, markersize=6, **ZNORM)
            axes.set_xscale("log")
            axes.set_ylim(0, 1.03)
            axes.set_title(optimizer, loc="left", fontsize="medium")
            axes.set_ylabel("accuracy")
        panels[-1].legend(frameon=False, loc="lower center")
        self._save("learning-rates", figure)

    def centring(self) -> None:
        """Draw the cosine between a gradient and what ZNorm makes of it, over the share of the mean."""
        deviations = torch.tensor([-1.0, 1.0] * 500)
        shares = [number / 200 for number in range(200)]
        figure, (axes,) = _axes(1, "share of the mean in the squared gradient")
        for centring, style in (("full", ZNORM), ("adaptive", {**PLAIN, "color": "#D55E00"})):
            cosines = []
            for share in shares:
                parameter = torch.nn.Parameter(torch.zeros_like(deviations))
                gradient = (1 - share) ** 0.5 * deviations + share**0.5
                parameter.grad = gradient.clone()
                zscore_grads_(parameter, centering=centring)
                cosines.append(float(torch.cosine_similarity(parameter.grad, gradient, dim=0)))
            axes.plot(
                shares, cosines, label=f'centering="{centring}"', linewidth=1.8, markevery=20, markersize=6, **style
            )
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("cosine to the gradient")
        axes.legend(frameon=False, loc="lower left")
        self._save("centring", figure)

    def report(self) -> None:
        """Draw figures of ``compare`` by its own code, from committed studies, and show the top of a report."""
        study = STUDIES / "cifar10-10k"
        tested = {
            method: {seed: next(iter(curve.values())) for seed, curve in by_seed.items()}
            for method, by_seed in _curves(study, "test/accuracy").items()
        }
        differences = {
            method: [tested[method][seed] - value for seed, value in tested["baseline"].items()]
            for method in METHODS[1:]
        }
        intervals = {method: paired_interval(values) for method, values in differences.items()}
        self._write("compare-forest", forest(differences, intervals, METHODS, "test/accuracy", "max")["png"])
        curves = _curves(study, "val/accuracy")
        self._write("compare-curves", plot(curves, METHODS, "val/accuracy")["png"])
        for optimizer in ("adam", "sgd"):
            self._write(f"compare-sweep-{optimizer}", _sweep(STUDIES / f"digits-{optimizer}"))
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if browser is None:
            print("left out: compare-report.png, because there is no Chromium to show the report")
            return
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "shot.png"
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={scratch}/profile", f"--screenshot={target}", "--window-size=760,1020"]
            subprocess.run(
                [*command, "--force-device-scale-factor=1.25", (study / "report.html").as_uri()],
                check=True,
                timeout=120,
                capture_output=True,
            )
            self._write("compare-report", target.read_bytes())

    def monitor(self) -> None:
        """Take what GradientMonitor draws, of a network with one sigmoid output that tells one rare digit."""
        with tempfile.TemporaryDirectory() as scratch:
            seed_everything(0, verbose=False)
            task = ClassificationTask("resnet20", 1, in_chans=1, optimizer=partial(torch.optim.Adam, lr=1e-4))
            _fit(
                task, RareDigits(batch_size=64, seed=0), self.epochs or 5, scratch, [ZNormCallback(), GradientMonitor()]
            )
            found = sorted(Path(scratch).rglob("gradients/*.png"))
            for path in found:
                self._write(f"monitor-{path.stem.removeprefix('grad_').replace('_', '-')}", path.read_bytes())

    def masks(self) -> None:
        """Take what MaskOverlay draws, of shapes in noise."""
        with tempfile.TemporaryDirectory() as scratch:
            write_shapes(Path(scratch) / "shapes")
            seed_everything(0, verbose=False)
            task = SegmentationTask(
                "attention_unet",
                num_classes=2,
                model_kwargs={"channels": [8, 16, 32], "strides": [2, 2]},
                activation="softmax",
                class_names=["cell"],
                optimizer=partial(torch.optim.Adam, lr=5e-3),
            )
            data = MaskFolderDataModule(Path(scratch) / "shapes", batch_size=8, num_classes=2, seed=0)
            _fit(task, data, self.epochs or 3, scratch, [ZNormCallback(), MaskOverlay(num_cases=1)])
            last = max(Path(scratch).rglob("masks/val-epoch=*.png"), key=lambda path: int(path.stem.partition("=")[2]))
            self._write("masks", last.read_bytes())

    def _save(self, name: str, figure: Figure) -> None:
        data = BytesIO()
        figure.savefig(data, format="png", dpi=160)
        self._write(name, data.getvalue())

    def _write(self, name: str, image: bytes) -> None:
        path = self.folder / f"{name}.png"
        picture = Image.open(BytesIO(image)).convert("RGB")
        picture.save(path, optimize=True)
        if path.stat().st_size > LARGEST:
            picture.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path.name}: {picture.width}x{picture.height} pixels, {path.stat().st_size // 1000} KB", flush=True)


def write_shapes(root: Path, images: int = 30, size: int = 160) -> None:
    """Write images of bright ellipses in noise, and their masks, as ``MaskFolderDataModule`` reads them."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(images):
        mask = np.zeros((size, size), bool)
        for _ in range(rng.integers(2, 5)):
            (y, x), (a, b), angle = (
                rng.uniform(0.2, 0.8, 2) * size,
                rng.uniform(0.07, 0.16, 2) * size,
                rng.uniform(0, np.pi),
            )
            along = (columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)
            across = (rows - y) * np.cos(angle) - (columns - x) * np.sin(angle)
            mask |= (along / a) ** 2 + (across / b) ** 2 < 1
        colour = np.where(mask[..., None], (150, 120, 170), (130, 108, 147)) + rng.normal(0, 12, (size, size, 1))
        Image.fromarray(colour.clip(0, 255).astype(np.uint8)).save(root / "images" / f"shape_{number:02}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"shape_{number:02}.png")


def _fit(task: LightningModule, data: LightningDataModule, epochs: int, folder: str, callbacks: list[Callback]) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        log_every_n_steps=1,
        logger=CSVLogger(folder),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(task, data)


def _curves(study: Path, metric: str, rate: str | None = None) -> dict[str, dict[int, dict[int, float]]]:
    """Return the values of a metric by method, seed and epoch, as a study's results.csv has them."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    with (study / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] == metric and rate in (None, row.get(RATE)):
                by_epoch = found.setdefault(row["method"], {}).setdefault(int(row["seed"]), {})
                by_epoch[int(row["epoch"])] = float(row["value"])
    return found


def _sweep(study: Path) -> bytes:
    """Return the picture of the validation metric over the swept learning rates."""
    with (study / "results.csv").open(newline="", encoding="utf-8") as file:
        rates = list(dict.fromkeys(row[RATE] for row in csv.DictReader(file)))
    scores: dict[str, dict[str, list[float]]] = {method: {} for method in METHODS}
    for rate in rates:
        validated, tested = (_curves(study, metric, rate) for metric in ("val/accuracy", "test/accuracy"))
        for method, by_seed in tested.items():
            # The test was made with the checkpoint of this epoch.
            scores[method][rate] = [validated[method][seed][epoch] for seed, (epoch,) in by_seed.items()]
    found = {}
    for method, by_rate in scores.items():
        best = max(by_rate, key=lambda rate, by_rate=by_rate: mean(by_rate[rate]))
        found[method] = [SweptValue(rate, values, rate == best) for rate, values in by_rate.items()]
    return plot_sweep(found, rates, "learning rate", "val/accuracy")["png"]


def _axes(rows: int, label: str, sharex: bool = True) -> tuple[Figure, list[Any]]:
    """Return a figure of several rows that can be read on a telephone: 400 pixels wide, letters are 11 pixels high."""
    with rc_context({"font.size": 10}):
        figure = Figure(figsize=(5, 0.4 + 2.1 * rows if rows > 1 else 3), layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(rows, 1, squeeze=False, sharex=sharex)[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel(label)
    return figure, panels


DRAWN: dict[str, Callable[[Pictures], None]] = {
    "training": Pictures.training,
    "learning-rates": Pictures.learning_rates,
    "centring": Pictures.centring,
    "report": Pictures.report,
    "monitor": Pictures.monitor,
    "masks": Pictures.masks,
}


def main(args: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the README and of docs/.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images", help="folder (default: docs/images)")
    parser.add_argument("--only", nargs="+", choices=DRAWN, default=list(DRAWN), help="which to draw (default: all)")
    parser.add_argument("--epochs", type=int, help="epochs of the trainings, for a quick try")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args(None if args is None else list(args))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # about unused workers and accelerators
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(options.output, options.epochs)
    for name in options.only:
        DRAWN[name](pictures)


if __name__ == "__main__":
    main()
