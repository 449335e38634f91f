"""Studies whose processes are stood in for: they write what runs write, at once."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from samples import FIT, TEST, write_run

from lightning_znorm import compare
from lightning_znorm.compare.processes import Processes
from lightning_znorm.compare.study import Run

SETTINGS = "{seed_everything: 1, trainer: {callbacks: null, logger: true, max_epochs: 2}}"


class Pretended:
    """A study of two methods and two seeds.

    Attributes:
        done: What processes did, such as ``baseline-0: fit``, since the last call of `run`.
        settings: What `fit --print_config` prints.
        does: What a process does in place of its work, by what it is to do; returns its exit code.
        gains: What znorm gains with a seed, beside what it gains with all.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.output = folder / "out"
        self.done: list[str] = []
        self.settings = SETTINGS
        self.does: dict[str, object] = {}
        self.gains: dict[int, float] = {}
        patch.chdir(folder)
        for name in ("exp", "baseline", "znorm"):
            Path(f"{name}.yaml").write_text("trainer: {}")
        patch.setattr(Processes, "capture", lambda processes, args: (0, self.settings, ""))
        patch.setattr(Processes, "run", lambda processes, args, log, *_, **__: self.process(args, log))
        # What figures look like is another test's.
        for figure in ("plot", "forest", "plot_sweep"):
            patch.setattr(f"lightning_znorm.compare.report.{figure}", lambda *args: {"png": b"", "svg": b""})

    def run(self, **options: object) -> compare.Table:
        self.done.clear()
        given = {"methods": ["baseline.yaml", "znorm.yaml"], "seeds": (0, 1), "output": "out"}
        return compare.run("exp.yaml", **{**given, "metric": "test/accuracy", "mode": "max", **options})

    def get(self, name: str) -> Run:
        method, seed = name.split("-")
        return Run(method, int(seed), self.output / "runs" / name)

    def interrupt(self, name: str) -> Run:
        """Make of a run that is done one that was killed before its end."""
        run = self.get(name)
        run.fit_file.unlink()
        run.test_file.unlink()
        return run

    def process(self, args: list[str], log: Path) -> int:
        """Do at once what a process of a run does."""
        command, folder = args[0], Path(args[2]).parent
        seed = folder.name.rpartition("-")[2]  # a trial has none
        run = Run(folder.name, int(seed) if seed.isdecimal() else 0, folder)
        what = f"{run.method}: {command}"
        if command == "fit" and "--ckpt_path" in args:
            what += f" from {Path(args[-1]).name}"
        if ".probe" not in str(folder):
            self.done.append(what)
        with log.open("a") as file:
            file.write(f"$ {what}\n")
        if what in self.does:
            return self.does[what](run)
        if command == "test":
            value = 0.5 + 0.1 * run.seed
            if run.method.startswith("znorm"):
                value += 0.05 + self.gains.get(run.seed, 0.0)
            tested = {**TEST["checkpoint"], "path": str(run.best)}
            run.test_file.write_text(json.dumps({"checkpoint": tested, "metrics": {"test/accuracy": value}}))
            return 0
        run.test_file.unlink(missing_ok=True)
        if "--ckpt_path" not in args:
            shutil.rmtree(run.best.parent, ignore_errors=True)
            write_run(run)
            run.test_file.unlink()
            run.best.parent.mkdir()
            write_checkpoint(run.best, [0])
            write_checkpoint(run.last, [0, 1])
        else:  # all epochs are behind it
            attempts = [int(folder.name.rpartition("_")[2]) for folder in run.logs.glob("version_*")]
            attempt = run.logs / f"version_{max(attempts, default=-1) + 1}"
            attempt.mkdir(parents=True)
            (attempt / "attempt.json").write_text(json.dumps({"step": 20}))
        run.fit_file.write_text(json.dumps(FIT))
        return 0


def write_checkpoint(path: Path, epochs: list[int], **content: object) -> None:
    """Write a checkpoint of a run."""
    made: Mapping[str, object] = {
        "state_dict": {"weight": torch.arange(20_000.0)},
        "epoch": epochs[-1],
        "callbacks": {"Recorder": {"logged_epochs": epochs}},
        "pytorch-lightning_version": "2.6.0",
        **content,
    }
    torch.save(made, path)
