"""Kill trainings with SIGKILL at random batches, resume them, and compare the weights with an uninterrupted run's.

``python -m benchmarks.interruptions --kills 20 --saves 20 --seed 0``: each line is a kill, of a random setup.
It needs Linux or macOS: processes are forked, because a new process would take longer to start than to train.
"""

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from benchmarks.kills import Kill, KillWhileSaving
from lightning_znorm import GradientCentralizationCallback, ZNormCallback
from lightning_znorm.data import DigitsDataModule, LGGDataModule
from lightning_znorm.data.augmentation import random_crop_and_flip
from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from tests.medical import write_lgg

EPOCHS = 3
TASKS = ("classification", "segmentation")
CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "ZNorm": lambda: [ZNormCallback()],
    "GC": lambda: [GradientCentralizationCallback()],
    "ZNorm+EMA": lambda: [ZNormCallback(), EMAWeightAveraging(decay=0.9)],
    "ZNorm+SWA": lambda: [ZNormCallback(), StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)],
}
# When a checkpoint is written. Every fifth step is never the last of an epoch here.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "every 5 steps": {"every_n_train_steps": 5},
    "every epoch": {},
    "every validation": {"save_on_train_epoch_end": False},
}
PRECISIONS = ("32-true", "bf16-mixed")
BATCHES = {("classification", 1): 21, ("classification", 2): 11, ("segmentation", 1): 11, ("segmentation", 2): 6}
"""Batches of an epoch in each process, by task and number of processes."""


@dataclass(frozen=True)
class Setup:
    task: str
    callback: str
    precision: str
    processes: int
    checkpoints: str


class AugmentedDigits(DigitsDataModule):
    def augment_batch(self, images: Tensor) -> Tensor:
        return random_crop_and_flip(images, padding=1)


def make(setup: Setup, data: Path) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Make a task and data that draw random numbers in the network and on the batch."""
    if setup.task == "classification":
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2)),
            *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)),
        )
        return ClassificationTask(network, num_classes=10, lr_scheduler=schedule), AugmentedDigits(batch_size=64)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2)),
        nn.Conv2d(8, 1, 3, padding=1),
    )
    return SegmentationTask(network, lr_scheduler=schedule), LGGDataModule(data, batch_size=4, augment=True)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


def train(setup: Setup, data: Path, folder: Path, extra: list[Callback], **fit: Any) -> str:
    """Train, from the last checkpoint of ``folder`` if there is one, and return a hash of all weights and buffers."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module, datamodule = make(setup, data)
    checkpoint = ModelCheckpoint(folder, save_last=True, **CHECKPOINTS[setup.checkpoints])
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=setup.processes,
        strategy="ddp" if setup.processes > 1 else "auto",
        precision=setup.precision,  # type: ignore[arg-type]
        deterministic=True,
        callbacks=[*CALLBACKS[setup.callback](), *extra, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=datamodule, **{"ckpt_path": "last", **fit})
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def forked(setup: Setup, data: Path, folder: Path, kill: Callback | None = None) -> str | None:
    """Run `train` in new processes, and return its hash, or None if it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "sum"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    leader = os.fork()
    if not leader:
        os.setsid()
        ranks = [_fork_rank(rank, setup, data, folder, kill, result, port) for rank in range(setup.processes)]
        codes = [os.waitpid(rank, 0)[1] for rank in ranks]
        os._exit(int(any(codes)))
    _, status = os.waitpid(leader, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    if status:
        raise RuntimeError(f"A training failed: {setup}. {(folder / 'log-0').read_text()[-2000:]}")
    return result.read_text()


def _fork_rank(
    rank: int, setup: Setup, data: Path, folder: Path, kill: Callback | None, result: Path, port: int
) -> int:
    if process := os.fork():
        return process
    code = 1
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if setup.processes > 1:  # as torchrun does
            names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": setup.processes}
            names |= {"LOCAL_WORLD_SIZE": setup.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in {**names, "TORCHELASTIC_RUN_ID": "0"}.items()})
        total = train(setup, data, folder, [] if kill is None else [kill])
        if rank == 0:
            result.write_text(total)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def draw_setups(kills: int, rng: random.Random) -> list[Setup]:
    """Draw setups in which every value of every setting comes about equally often."""
    setups: list[Setup] = []
    settings = [TASKS, tuple(CALLBACKS), PRECISIONS, (1, 2), tuple(CHECKPOINTS)]
    columns = []
    for values in settings:
        column = list(itertools.islice(itertools.cycle(values), kills))
        rng.shuffle(column)
        columns.append(column)
    for row in zip(*columns, strict=True):
        setups.append(Setup(*row))
    return setups


def main(kills: int, saves: int, seed: int) -> int:
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    try:
        write_lgg(folder / "data", patients=10, slices=6)
        return int(not (_kill_batches(kills, seed, folder) & _kill_saves(saves, seed, folder)))
    finally:
        shutil.rmtree(folder)


def _kill_batches(kills: int, seed: int, folder: Path) -> bool:
    rng = random.Random(seed)
    references: dict[Setup, str | None] = {}
    exact = 0
    header = ("task", "callback", "precision", "processes", "checkpoints", "killed in batch", "went on from", "weights")
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header))
    for number, setup in enumerate(draw_setups(kills, rng)):
        if setup not in references:
            references[setup] = forked(setup, folder / "data", folder / f"whole-{number}")
        run = folder / f"killed-{number}"
        batch = rng.randrange(5, EPOCHS * BATCHES[setup.task, setup.processes])
        killed = forked(setup, folder / "data", run, Kill(batch, rng.randrange(setup.processes)))
        assert killed is None
        origin = _origin(run)
        same = forked(setup, folder / "data", run) == references[setup]
        exact += same
        row = (*astuple(setup), batch, origin, "the same bits" if same else "DIFFERENT")
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"\n{exact} of {kills} trainings that were killed in a batch went on exactly.\n", flush=True)
    return exact == kills


def _kill_saves(saves: int, seed: int, folder: Path) -> bool:
    """Kill trainings while they save; each must have a checkpoint that loads, and resume exactly."""
    rng = random.Random(seed)
    setup = Setup("classification", "ZNorm+EMA", "32-true", 1, "every 5 steps")
    whole = forked(setup, folder / "data", folder / "whole")
    exact, unfinished = 0, 0
    origins = []
    for number in range(saves):
        run = folder / f"saving-{number}"
        # While it saves the second checkpoint (its own file, or the copy last.ckpt), so that the first can be used.
        kill = KillWhileSaving(save=rng.choice((3, 4)), delay=rng.uniform(0, 0.02))
        killed = forked(setup, folder / "data", run, kill)
        assert killed is None
        origins.append(_origin(run))
        unfinished += len([path for path in run.iterdir() if path.suffix != ".ckpt" and "log" not in path.name])
        exact += forked(setup, folder / "data", run) == whole
    counts = ", ".join(f"{origins.count(origin)} from {origin}" for origin in sorted(set(origins)))
    print(f"{exact} of {saves} trainings that were killed while they saved went on exactly: {counts};")
    print(f"{unfinished} unfinished files were left beside the checkpoints.")
    return exact == saves


def _origin(run: Path) -> str:
    last = run / "last.ckpt"
    return f"step {torch.load(last, weights_only=True)['global_step']}" if last.exists() else "the start"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="trainings to kill in a batch")
    parser.add_argument("--saves", type=int, default=20, help="trainings to kill while they save")
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
