"""Kill ``python -m lightning_znorm fit`` with SIGKILL at random batches, resume it, and compare the weights.

``python -m benchmarks.cli_interruptions --kills 10 --seed 0``: every second training has two processes, under DDP.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]
# A network with dropout and batch normalization. A checkpoint every 5 steps is never at the last step of an epoch here.
# One more checkpoint is written at the end.
EXPERIMENT = """
model:
  class_path: ClassificationTask
  init_args:
    model: test_efficientnet
    model_kwargs: {drop_rate: 0.3}
    num_classes: 10
    in_chans: 1
data:
  class_path: DigitsDataModule
  init_args: {batch_size: 64}
trainer:
  max_epochs: 3
  accelerator: cpu
  deterministic: true
  log_every_n_steps: 1
  logger: {class_path: CSVLogger, init_args: {save_dir: logs}}
  enable_progress_bar: false
  enable_model_summary: false
  callbacks+:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 5, save_last: true}
    - class_path: ModelCheckpoint
      init_args: {dirpath: end, filename: end, every_n_epochs: 3}
"""
KILL = """
trainer:
  callbacks+:
    - class_path: benchmarks.kills.Kill
      init_args: {{batch: {batch}, rank: {rank}}}
"""
BATCHES = {1: 63, 2: 33}
"""Batches of a training in each process, by number of processes."""


def fit(folder: Path, processes: int, *arguments: str) -> int:
    """Run ``fit`` in a folder until all its processes are gone, and return its exit status."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.yaml").write_text(EXPERIMENT)
    command = [sys.executable, "-m", "lightning_znorm", "fit", "--config", "experiment.yaml"]
    command += ["--config", "configs/methods/znorm.yaml", "--trainer.devices", str(processes), *arguments]
    if processes > 1:
        command += ["--trainer.strategy", "ddp"]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=200)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            else:
                process.wait()


def weights(folder: Path) -> dict[str, object]:
    """Return the state of the network and of its optimizer."""
    checkpoint = torch.load(folder / "end" / "end.ckpt", weights_only=True)
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states")}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def completed(folder: Path, processes: int, *arguments: str) -> dict[str, object]:
    if code := fit(folder, processes, *arguments):
        raise RuntimeError(f"fit ended with {code}: {(folder / 'log').read_text()[-2000:]}")
    return weights(folder)


def main(kills: int, seed: int, processes: list[int]) -> int:
    rng = random.Random(seed)
    exact = 0
    whole: dict[int, dict[str, object]] = {}
    print("| processes | killed in batch | went on from | weights and optimizer |\n|" + " --- |" * 4, flush=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for number in range(kills):
            count = processes[number % len(processes)]
            if count not in whole:
                whole[count] = completed(folder / f"whole-{count}", count)
            run = folder / f"killed-{number}"
            batch = rng.randrange(6, BATCHES[count])
            run.mkdir()
            (run / "kill.yaml").write_text(KILL.format(batch=batch, rank=rng.randrange(count)))
            code = fit(run, count, "--config", "kill.yaml")
            if code != -signal.SIGKILL or (run / "end").exists():
                raise RuntimeError(f"fit was to be killed, and ended with {code}: {(run / 'log').read_text()[-2000:]}")
            (last,) = run.rglob("last.ckpt")
            step = torch.load(last, weights_only=True)["global_step"]
            alike = same(completed(run, count, "--ckpt_path", "last"), whole[count])
            if f"Restored all states from the checkpoint at {last.relative_to(run)}" not in (run / "log").read_text():
                raise RuntimeError(f"fit did not go on from {last}: {(run / 'log').read_text()[-2000:]}")
            exact += alike
            row = (count, batch, f"step {step}", "the same bits" if alike else "DIFFERENT")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"\n{exact} of {kills} command lines that were killed went on exactly.")
    return int(exact < kills)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", choices=BATCHES, default=list(BATCHES))
    sys.exit(main(**vars(parser.parse_args())))
