"""Send SIGTERM to trainings of two processes under DDP at random moments, and count the results.

``python -m benchmarks.terminations --trials 5 --seed 0`` prints a line for each way to start a training and each choice
of processes that get the signal. The line says how many trainings ended by themselves, left a checkpoint
(``ModelCheckpoint(save_on_exception=True)``), and went on from it to the weights of an uninterrupted run. The network
has no dropout, because such a checkpoint has the random numbers of the first process only. It needs Linux.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.cli_interruptions import EXPERIMENT, REPOSITORY, same, weights

LIMIT = 45  # seconds that a training has to end: torchrun gives its processes 30
SETTINGS = """
trainer:
  max_epochs: 6
  strategy: ddp
  devices: 2
  callbacks:
    - class_path: ZNormCallback
    - class_path: benchmarks.kills.Pace
      init_args: {started: started, seconds: 0.02}
    - class_path: ModelCheckpoint
      init_args: {dirpath: saved, save_last: true, save_on_exception: true, every_n_train_steps: 1000}
    - class_path: ModelCheckpoint
      init_args: {dirpath: end, filename: end, every_n_epochs: 6}
"""
SCRIPT = """
import sys
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from benchmarks.kills import Pace
from lightning_znorm import ZNormCallback
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.tasks import ClassificationTask

pl.seed_everything(0)
callbacks = [
    ZNormCallback(),
    Pace("started", 0.02),
    ModelCheckpoint("saved", save_last=True, save_on_exception=True, every_n_train_steps=1000),
    ModelCheckpoint("end", "end", every_n_epochs=6),
]
quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", deterministic=True, max_epochs=6, callbacks=callbacks, **quiet
)
task = ClassificationTask("test_efficientnet", num_classes=10, in_chans=1, model_kwargs={"drop_rate": 0.0})
trainer.fit(task, datamodule=DigitsDataModule(batch_size=64), ckpt_path=sys.argv[2] if sys.argv[1:] else None)
"""
CLI = ["-m", "lightning_znorm", "fit", "--config", "experiment.yaml", "--config", "settings.yaml"]
STARTS = {
    "command line": CLI,
    "script": ["script.py"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *CLI],
}


def to_each(*which: int) -> Callable[[list[int]], None]:
    def send(processes: list[int]) -> None:
        for index in which:
            os.kill(processes[index], signal.SIGTERM)

    return send


# Processes are listed in the order of their start. torchrun starts each training process in a session of its own.
TARGETS: dict[str, dict[str, Callable[[list[int]], None]]] = {
    start: {
        "process 0": to_each(0),
        "process 1": to_each(1),
        "both": to_each(0, 1),
        "the process group": lambda processes: os.killpg(processes[0], signal.SIGTERM),
    }
    for start in ("command line", "script")
} | {"torchrun": {"torchrun": to_each(0)}}


class Training:
    """A training that leaves no process behind."""

    def __init__(self, start: str, folder: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "experiment.yaml").write_text(EXPERIMENT.partition("  callbacks+")[0].replace("0.3", "0.0"))
        (folder / "settings.yaml").write_text(SETTINGS)
        (folder / "script.py").write_text(SCRIPT)
        (folder / "started").unlink(missing_ok=True)
        self.folder = folder
        self.mark = f"ZNORM_TRAINING={folder}"
        name, _, value = self.mark.partition("=")
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *STARTS[start], *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", name: value},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Return the processes that still run, in the order of their start."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # the process is gone, or another user's
                continue
        return sorted(found)

    def wait_for_first_batch(self) -> None:
        while not (self.folder / "started").exists():
            if self.process.poll() is not None:
                raise RuntimeError(f"a training did not begin: {self.log()}")
            time.sleep(0.01)

    def ended(self, seconds: float) -> bool:
        """Return whether all processes end within so many seconds, and kill those that do not."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            if self.process.poll() is not None and not self.processes():
                return True
            time.sleep(0.05)
        self.kill()
        return False

    def kill(self) -> None:
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


def completed(start: str, folder: Path, *arguments: str) -> dict[str, object]:
    """Train without an interruption, and return the weights."""
    training = Training(start, folder, *arguments)
    try:
        if not training.ended(200) or training.process.returncode:
            raise RuntimeError(f"a training failed: {training.log()}")
    finally:
        training.kill()
    return weights(folder)


def terminated(start: str, target: str, folder: Path, delay: float) -> str | None:
    """Send SIGTERM ``delay`` seconds after the first batch; return how the training ended, or None if it was killed."""
    training = Training(start, folder)
    try:
        training.wait_for_first_batch()
        time.sleep(delay)
        TARGETS[start][target](training.processes())
        ended = training.ended(LIMIT)
    finally:
        training.kill()
    return f"exit status {training.process.returncode}" if ended else None


def main(trials: int, seed: int, starts: list[str]) -> int:
    rng = random.Random(seed)
    header = ("started by", "SIGTERM to", "trainings", "ended, with", "hung", "left a checkpoint", "went on exactly")
    print("| " + " | ".join(header) + " |\n|" + " --- |" * len(header), flush=True)
    with tempfile.TemporaryDirectory() as made:
        whole = {start: completed(start, Path(made) / start) for start in starts}
        for start, target in [(each, target) for each in starts for target in TARGETS[each]]:
            ends: Counter[str] = Counter()
            hung, saved, exact = 0, 0, 0
            for number in range(trials):
                folder = Path(made) / re.sub(" ", "-", f"{start} {target} {number}")
                end = terminated(start, target, folder, rng.uniform(0, 1.5))
                hung += end is None
                ends.update([] if end is None else [end])
                if (folder / "saved" / "last.ckpt").exists():
                    saved += 1
                    arguments = ("--ckpt_path", "saved/last.ckpt")
                    exact += same(completed(start, folder, *arguments), whole[start])
            how = ", ".join(f"{count} with {end}" for end, count in ends.most_common())
            row = (start, target, trials, how or "none", hung, saved, f"{exact} of {saved}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    sys.exit(main(**vars(parser.parse_args())))
