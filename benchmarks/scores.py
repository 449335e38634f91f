"""Time of ``test`` with all scores, beside ``test`` with Dice alone: ``python -m benchmarks.scores``.

U-Net++ sees images of 256x256 in batches of 16. The masks that it predicts are given: blobs, as of a trained network,
or noise, as of an untrained one, for which distances take longest. All scores are what a segmentation logs by default,
and ``scores.csv`` with a line for each case (HD95 among them). The target is 1.3 times the time with Dice alone.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.metrics import blobs
from benchmarks.timing import alternating_medians
from lightning_znorm import ScoreWriter
from lightning_znorm.metrics import DiceScore
from lightning_znorm.tasks import SegmentationTask
from lightning_znorm.tasks.networks import create_segmenter


class Predicts(nn.Module):
    """Runs a network, and returns the last channel of the images as its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = create_segmenter("unetpp")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images[:, :3])[-1] * 0 + images[:, 3:]


class Cases(Dataset):
    def __init__(self, preds: Tensor, target: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        colours = torch.randn(len(preds), 3, *preds.shape[2:], generator=generator)
        self.images = torch.cat([colours, preds.float() - 0.5], dim=1)
        self.masks = target.float()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, object]]:
        return self.images[index], self.masks[index], {"name": f"{index}.png", "patient": str(index // 8)}


def testing(data: DataLoader, folder: str, network: nn.Module, everything: bool) -> Callable[[], object]:
    task = SegmentationTask(network, metrics=None if everything else {"dice": DiceScore()})
    run = Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[ScoreWriter()] if everything else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return lambda: run.test(task, data, verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of test with all scores, beside test with Dice alone.")
    parser.add_argument("--images", type=int, default=32, help="images of a test (default: 32)")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a batch (default: 16)")
    parser.add_argument("--size", type=int, default=256, help="side of an image in pixels (default: 256)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="timed tests of each row (default: 3)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    generator = torch.Generator().manual_seed(0)
    shape = (args.images, 1, args.size, args.size)
    masks = {
        "blobs": [blobs(args.images, args.size, generator) for _ in range(2)],
        "noise": [torch.rand(shape, generator=generator) < 0.5 for _ in range(2)],
    }
    network = Predicts()
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, CPU, {args.threads} threads\n"
        f"U-Net++, {args.images} images of {args.size}x{args.size} in batches of {args.batch_size}, median of "
        f"{args.rounds} tests\n"
    )
    print("| masks | scores              | ms an image | of Dice alone |")
    print("| ----- | ------------------- | ----------: | ------------: |")
    for name, pair in masks.items():
        data = DataLoader(Cases(*pair), batch_size=args.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            functions = {
                "Dice alone": testing(data, folder, network, everything=False),
                "all, and scores.csv": testing(data, folder, network, everything=True),
            }
            seconds = alternating_medians(functions, args.rounds, warmup=1)
        for row, each in seconds.items():
            ratio = each / seconds["Dice alone"]
            print(f"| {name} | {row:19} | {each * 1e3 / args.images:11.1f} | {ratio:13.3f} |")


if __name__ == "__main__":
    main()
