"""What a study needs of each of its runs, beside the experiment's own logs."""

import hashlib
import os
import platform
import random
import shlex
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_znorm.callbacks import GradientTransform
from lightning_znorm.callbacks.step_watch import unwrapped
from lightning_znorm.compare.checkpoints import STOPPED, BestCheckpoint, monitored_value
from lightning_znorm.compare.files import read_json, write_json
from lightning_znorm.compare.results import GRADIENT_NORM, LOGGED_EPOCHS, STEP_SECONDS, TRAIN_SECONDS, count_numbers
from lightning_znorm.compare.study import Run
from lightning_znorm.functional import attached_optimizers
from lightning_znorm.gradients.amp import is_unscaled
from lightning_znorm.metrics.dtypes import widest_float
from lightning_znorm.tasks.random_states import random_state, set_random_state


class Recorder(Callback):
    """Records how far a run has come, how fast it is and how large its gradients are.

    Logged, beside what the experiment logs:

    - ``compare/gradient_norm``: norm of all gradients that an optimizer is about to use, before the callbacks that come
      after this one (a gradient method) and before clipping; every ``log_every_n_steps`` steps, and only with
      strategies that keep whole gradients on each device.
    - ``compare/step_seconds``: mean time of the epoch's training batches, with loading and without validation.
    - ``compare/train_seconds``: time of all training batches up to now, over all attempts at the run.

    Every epoch begins with random numbers that follow from the seed and the epoch alone. So the order of batches stays
    the same under a method that draws random numbers, and after an interruption.

    The files of the run are of its own settings, in ``run.yaml``: under others ``fit`` is refused, and ``test`` writes
    nothing down.

    Args:
        folder: The run's folder.
        seed: The run's seed.

    Raises:
        MisconfigurationException: Before training, if it was started with other settings than the run's own.
    """

    def __init__(self, folder: str, seed: int) -> None:
        self.folder = Path(folder)
        self.seed = seed
        self._epoch = 0  # that comes next
        self._seconds = 0.0
        self._epoch_seconds = 0.0
        self._epoch_batches = 0
        self._clock: float | None = None
        self._first_numbers: dict[str, Any] | None = None
        self._has_whole_tensors = False
        self._weights: str | None = None
        self._optimizers: list[str] = []
        self._methods: dict[str, list[str]] = {}
        self._logged: set[str] = set()
        self._logged_epochs: list[int] = []
        self._tested: dict[str, Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "seconds": self._seconds,
            "weights": self._weights,
            "optimizers": self._optimizers,
            "methods": self._methods,
            "logged": sorted(self._logged),
            LOGGED_EPOCHS: self._logged_epochs,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch, self._seconds, self._weights = (state_dict[key] for key in ("epoch", "seconds", "weights"))
        self._optimizers = state_dict.get("optimizers", [])
        self._methods = state_dict.get("methods", {})
        self._logged = set(state_dict.get("logged", []))
        self._logged_epochs = list(state_dict.get(LOGGED_EPOCHS, []))

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[STOPPED] = trainer.should_stop

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # For the test: said by the checkpoint that is loaded, not by whoever asked for one.
        monitor, value = monitored_value(checkpoint)
        path = os.path.abspath(str(trainer.ckpt_path))
        self._tested = {"path": path, "epoch": checkpoint["epoch"], "monitor": monitor, "value": value}
        trainer.should_stop = checkpoint.get(STOPPED, False)  # else it would train on

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if others := self._other_settings(trainer):
            raise MisconfigurationException(
                f"{self.folder} is a run of a study, and trains with the settings in its run.yaml and from its own "
                f"checkpoints alone, not with {others}: give options to `compare` (under another --output), or name "
                "the files of the experiment and the method in place of run.yaml"
            )
        # The first iterator over the training data is made between here and the start of the epoch, later ones after
        # the start of theirs.
        self._reseed()
        self._has_whole_tensors = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if trainer.is_global_zero:  # of a former training in this folder, if it was begun again by hand
            for name in ("fit.json", "test.json"):
                (self.folder / name).unlink(missing_ok=True)
            if trainer.ckpt_path is None:  # else it would be gone on from, or tested, if this one dies early
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        trainer.strategy.barrier("Recorder.on_fit_start")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._epoch == 0 and self._has_whole_tensors and trainer.is_global_zero:
            self._weights = _fingerprint(pl_module)
        if self._epoch == 0:
            self._optimizers = [_described(optimizer) for optimizer in trainer.optimizers]
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, CSVLogger):
                write_json(Path(logger.log_dir) / "attempt.json", {"step": _batches(trainer)})
        self._write_progress(trainer)
        self._first_numbers = random_state(pl_module.device)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first_numbers is None:
            self._reseed()
        else:  # back to them, for a task that is resumed goes on with those of its checkpoint
            set_random_state(self._first_numbers, pl_module.device)
            self._first_numbers = None
        self._epoch_seconds, self._epoch_batches = 0.0, 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()
        self._epoch_batches += 1

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._has_whole_tensors or not trainer._logger_connector.should_update_logs:
            return
        norm = _gradient_norm(trainer, optimizer)
        if norm is not None:
            optimizers = [unwrapped(each) for each in trainer.optimizers]
            name = f"{GRADIENT_NORM}-{optimizers.index(optimizer)}" if len(optimizers) > 1 else GRADIENT_NORM
            _log(trainer, {name: norm}, _batches(trainer))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock(trainer)
        self._seconds += self._epoch_seconds
        self._epoch = trainer.current_epoch + 1
        self._methods = _methods(trainer, pl_module)
        self._logged |= {*trainer.callback_metrics, *trainer.logged_metrics}
        times = {TRAIN_SECONDS: self._seconds}
        if self._epoch_batches:
            times[STEP_SECONDS] = self._epoch_seconds / self._epoch_batches
        _log(trainer, times, _batches(trainer) - 1)
        self._logged_epochs = [*self._logged_epochs, trainer.current_epoch]
        self._write_progress(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.interrupted:
            return
        callbacks: Any = trainer  # of which Lightning declares no callbacks
        for callback in callbacks.callbacks:
            if isinstance(callback, BestCheckpoint) and not callback.best_model_path:
                reason = (
                    f"{callback.monitor} was not logged by the end of any of {self._epoch} epochs. Validate more often "
                    "(trainer.check_val_every_n_epoch, trainer.limit_val_batches), or monitor another metric."
                    if trainer.global_step
                    else "Lightning has seen no optimizer step. Step the optimizers that self.optimizers() returns."
                )
                raise MisconfigurationException(f"There is no best checkpoint to test: {reason}")
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        content = {
            "epochs": self._epoch,
            "seconds": self._seconds,
            "parameters": parameters,
            "weights": self._weights,
            "optimizers": self._optimizers,
            "methods": self._methods,
            "logged": sorted({*self._logged, *trainer.callback_metrics, *trainer.logged_metrics}),
            # So that a log that is damaged later is not taken for a whole one.
            LOGGED_EPOCHS: self._logged_epochs,
            "logged_numbers": count_numbers(Run("", self.seed, self.folder)),
        }
        write_json(self.folder / "fit.json", {**content, **_surroundings(trainer)})

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if others := self._other_settings(trainer) or self._other_checkpoint(trainer):
            rank_zero_warn(
                f"{self.folder / 'test.json'} stays as it is, for this was another test than the study's: {others}."
            )
        elif trainer.is_global_zero:
            # A name that training logs too would be two numbers in one.
            taken = (read_json(self.folder / "fit.json") or {}).get("logged", [])
            metrics = {
                f"test/{name}" if name in taken else name: float(value)
                for name, value in trainer.callback_metrics.items()
            }
            write_json(self.folder / "test.json", {"checkpoint": self._tested, "metrics": metrics})

    def _other_settings(self, trainer: pl.Trainer) -> str:
        """What was typed beside the run's own settings and checkpoints; empty if nothing was."""
        own = os.path.realpath(self.folder / "run.yaml")
        files = (path for path in getattr(trainer, "config_files", ()) if os.path.realpath(path) != own)
        words = [*(word for path in files for word in ("--config", str(path))), *getattr(trainer, "flags", ())]
        folder, name = os.path.split(os.path.realpath(trainer.ckpt_path or ""))
        is_own = folder == os.path.realpath(self.folder / "checkpoints")
        # Where a job is requeued by SLURM, Lightning goes on from a checkpoint that it names itself.
        if trainer.ckpt_path and not is_own and not name.startswith("hpc_ckpt_"):
            words += ["--ckpt_path", str(trainer.ckpt_path)]
        return shlex.join(words)

    def _other_checkpoint(self, trainer: pl.Trainer) -> str:
        """What was tested, if it is not the checkpoint that the study tests."""
        typed: Any = trainer  # Lightning declares no callbacks of it
        monitored = any(isinstance(callback, BestCheckpoint) for callback in typed.callbacks)
        name = os.path.basename(trainer.ckpt_path or "no checkpoint")
        return "" if name == ("best.ckpt" if monitored else "last.ckpt") else name

    def _reseed(self) -> None:
        seed = int(np.random.SeedSequence([self.seed, self._epoch]).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _stop_clock(self, trainer: pl.Trainer) -> None:
        if self._clock is not None:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize(trainer.strategy.root_device)
            self._epoch_seconds += time.perf_counter() - self._clock
            self._clock = None

    def _write_progress(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            epochs, steps = trainer.max_epochs or -1, trainer.max_steps
            share = max(self._epoch / epochs if epochs > 0 else 0, trainer.global_step / steps if steps > 0 else 0)
            write_json(self.folder / "progress.json", {"epoch": self._epoch, "share": min(share, 1.0)})


def _batches(trainer: pl.Trainer) -> int:
    """The step under which Lightning logs."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _log(trainer: pl.Trainer, metrics: dict[str, Any], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics={**metrics, "epoch": trainer.current_epoch}, step=step)
        logger.save()


def _methods(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, list[str]]:
    """Name the gradient methods that work: callbacks given or added, and optimizers that have one attached."""
    typed: Any = trainer  # Lightning declares no callbacks of it
    given = {id(callback) for callback in getattr(trainer, "given_callbacks", typed.callbacks)}
    found: dict[str, list[str]] = {"given": [], "added": [], "attached": []}
    for callback in typed.callbacks:
        if isinstance(callback, GradientTransform):
            found["given" if id(callback) in given else "added"].append(type(callback).__name__)
    parameters = set(map(id, module.parameters()))
    for optimizer in attached_optimizers():
        if any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
            found["attached"].append(type(optimizer).__name__)
    return found


def _described(optimizer: Optimizer) -> str:
    """An optimizer's class and settings, such as ``SGD(lr=0.1, momentum=0.9)``; those of each of several groups."""
    groups = []
    for group in optimizer.param_groups:
        shown = {**getattr(optimizer, "defaults", {}), **group}  # in the same order for all groups
        shown["lr"] = group.get("initial_lr", group.get("lr"))  # a scheduler may have changed it already
        for key in ("params", "initial_lr"):
            shown.pop(key, None)
        values = (f"{key}={_plain(value)}" for key, value in shown.items() if value is not None and value is not False)
        groups.append(", ".join(values))
    return f"{type(optimizer).__name__}({'; '.join(dict.fromkeys(groups))})"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _fingerprint(module: pl.LightningModule) -> str:
    """Names weights by their content, so that a report can say whether methods began with the same."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        if not is_lazy(parameter):
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _gradient_norm(trainer: pl.Trainer, optimizer: Optimizer) -> Tensor | None:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or any(gradient.is_sparse for gradient in gradients):
        return None
    norms = [_norm(gradient.detach()) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device, norms[0].dtype) for each in norms]))
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled() and not is_unscaled(scaler, optimizer):
        norm = norm / scaler._get_scale_async()
    return norm


def _norm(gradient: Tensor) -> Tensor:
    # In half precision the norm of a large layer overflows; in single precision a CPU's sum has three digits.
    wide = torch.promote_types(gradient.dtype, widest_float(gradient.device))
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=wide)
    return norm


def _surroundings(trainer: pl.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = {}
    for package in ("lightning-znorm", "torch", "lightning", "torchmetrics"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "device": f"{trainer.num_devices} x {device.type}: {name}",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **packages},
    }
