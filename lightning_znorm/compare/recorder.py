"""The callback that records what a study needs of each run, beside the experiment's own logs."""

import hashlib
import inspect
import os
import platform
import random
import shlex
import shutil
import time
from collections import Counter
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR
from typing_extensions import override

from lightning_znorm.callbacks import GradientTransform
from lightning_znorm.callbacks.measurement import GradientMeter, logged_step
from lightning_znorm.callbacks.steps import StepTracker
from lightning_znorm.callbacks.strategies import find_support, gradient_adapter, is_tested, shards_gradients
from lightning_znorm.compare.checkpoints import STOPPED, BestCheckpoint, monitored_value
from lightning_znorm.compare.files import read_json, write_json
from lightning_znorm.compare.results import GRADIENT_NORM, LOGGED_EPOCHS, STEP_SECONDS, TRAIN_SECONDS, count_numbers
from lightning_znorm.compare.study import Run
from lightning_znorm.functional import attached_optimizers
from lightning_znorm.gradients import UnsupportedGradientError
from lightning_znorm.gradients.adapters import GradientAdapter
from lightning_znorm.tasks.random_states import random_state, set_random_state

_COMPOSED = (ChainedScheduler, SequentialLR)


class Recorder(Callback):
    """Record how far a run has come, how fast it is and how large its gradients are.

    Logged, beside what the experiment logs:

    - ``compare/gradient_norm``: the norm of all gradients that an optimizer is about to use, before a gradient method
      and before ``gradient_clip_val``, at every ``log_every_n_steps``-th step. It is measured as
      :class:`~lightning_znorm.GradientMonitor` does: of several steps of one optimizer in a batch, the first one
      counts; it is not finite if the squared deviations of a gradient overflow; and in manual optimization,
      ``self.clip_gradients`` runs before. If gradients cannot be measured (unknown strategy, sparse gradients, an
      unsupported feature of DeepSpeed), a warning says why.
    - ``compare/step_seconds``: mean time of the epoch's training batches, with loading and without validation.
    - ``compare/train_seconds``: time of all training batches so far, over all attempts at the run.

    The random state at the start of every epoch follows from the seed and the epoch alone. So the order of batches is
    the same for a method that draws random numbers, and after an interruption.

    The run's folder holds results of the settings in its ``run.yaml`` alone. With other settings, ``fit`` is refused
    and ``test`` writes no results.

    Args:
        folder: The run's folder.
        seed: The run's seed.

    Raises:
        MisconfigurationException: Before training, if it was started with other settings than the run's own.
    """

    def __init__(self, folder: str, seed: int) -> None:
        self.folder = Path(folder)
        self.seed = seed
        self._epoch = 0  # the next one
        self._seconds = 0.0
        self._epoch_seconds = 0.0
        self._epoch_batches = 0
        self._clock: float | None = None
        self._first_random_state: dict[str, Any] | None = None
        self._tracker, self._meter = StepTracker(), GradientMeter()
        self._adapter: GradientAdapter | None = None
        self._weights: str | None = None
        self._optimizers: list[str] = []
        self._schedulers: list[str] | None = None
        self._methods: dict[str, list[str]] = {}
        self._logged: set[str] = set()
        self._logged_epochs: list[int] = []
        self._tested: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer that uses this callback does not use a copy of it.
        return {**vars(self), "_adapter": None}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "seconds": self._seconds,
            "weights": self._weights,
            "optimizers": self._optimizers,
            "schedulers": self._schedulers,
            "methods": self._methods,
            "logged": sorted(self._logged),
            LOGGED_EPOCHS: self._logged_epochs,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch, self._seconds, self._weights = (state_dict[key] for key in ("epoch", "seconds", "weights"))
        self._optimizers = state_dict.get("optimizers", [])
        self._schedulers = state_dict.get("schedulers")
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
        # The test's results name the checkpoint that was loaded, which may not be the one that was asked for.
        monitor, value = monitored_value(checkpoint)
        path = Path(os.path.realpath(str(trainer.ckpt_path)))
        folder = Path(os.path.realpath(self.folder))
        if path.is_relative_to(folder):  # a study's folder may be moved, or be a part of a clone
            path = path.relative_to(folder)
        self._tested = {"path": path.as_posix(), "epoch": checkpoint["epoch"], "monitor": monitor, "value": value}
        trainer.should_stop = checkpoint.get(STOPPED, False)  # otherwise the run would continue to train

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if others := self._other_settings(trainer):
            raise MisconfigurationException(
                f"{self.folder} is a run of a study, and trains with the settings in its run.yaml and from its own "
                f"checkpoints alone, not with {others}: give options to `compare` (under another --output), or name "
                "the files of the experiment and the method in place of run.yaml"
            )
        # Lightning makes the first iterator over the training data before the first epoch starts, and the iterators of
        # later epochs after these have started.
        self._reseed()
        if trainer.is_global_zero:  # these files are left from an earlier training in this folder
            for name in ("fit.json", "test.json"):
                (self.folder / name).unlink(missing_ok=True)
            if trainer.ckpt_path is None:  # old checkpoints would be resumed or tested if this run dies early
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        trainer.strategy.barrier("Recorder.on_fit_start")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tracker, self._adapter = StepTracker(), self._find_adapter(trainer, pl_module)
        self._tracker.start_training()
        # Where gradients are sharded, this process may hold only a part of the weights.
        support = find_support(trainer.strategy)
        has_all_weights = support is not None and not support.shards_gradients
        if self._epoch == 0 and has_all_weights and trainer.is_global_zero:
            self._weights = _fingerprint(pl_module)
        if self._epoch == 0:
            self._optimizers = [_described(optimizer) for optimizer in trainer.optimizers]
            self._schedulers = [_described_schedule(config) for config in trainer.lr_scheduler_configs]
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, CSVLogger):
                write_json(Path(logger.log_dir) / "attempt.json", {"step": logged_step(trainer)})
        self._write_progress(trainer)
        self._first_random_state = random_state(pl_module.device)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first_random_state is None:
            self._reseed()
        else:  # a resumed task has restored the random state of its checkpoint
            set_random_state(self._first_random_state, pl_module.device)
            self._first_random_state = None
        self._epoch_seconds, self._epoch_batches = 0.0, 0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()
        self._epoch_batches += 1
        self._tracker.start_batch()
        self._meter.start_batch()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._adapter is None:
            return
        adapter = self._adapter
        step = self._tracker.before_step(
            trainer, pl_module, optimizer, adapter, lambda: list(adapter.slots_of(optimizer))
        )
        if step is None:
            return
        try:
            measurement = self._meter.measure(step)
        except UnsupportedGradientError as error:
            if shards_gradients(trainer.strategy):
                raise  # other processes may be waiting for the sums of this one
            self._adapter = None
            rank_zero_warn(f"The curve of gradient norms ends here, because they cannot be measured: {error}")
            return
        if measurement is not None and measurement.slots:
            suffix = "" if measurement.optimizer_number is None else f"-{measurement.optimizer_number}"
            _log(trainer, {f"{GRADIENT_NORM}{suffix}": measurement.norm}, measurement.logged_step)

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._tracker.zero_grad()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tracker.backward()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tracker.end_batch()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget_run()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._forget_run()  # Lightning calls no `teardown` then

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._forget_run()

    def _forget_run(self) -> None:
        """Drop what would keep the model alive."""
        self._tracker, self._adapter = StepTracker(), None

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
        _log(trainer, times, logged_step(trainer) - 1)
        self._logged_epochs = [*self._logged_epochs, trainer.current_epoch]
        self._write_progress(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.interrupted:
            return
        typed: Any = trainer  # Lightning declares no callbacks of it
        for callback in typed.callbacks:
            if isinstance(callback, BestCheckpoint) and not callback.best_model_path:
                reason = (
                    f"{callback.monitor} was not logged by the end of any of {self._epoch} epochs. Validate more often "
                    "(trainer.check_val_every_n_epoch, trainer.limit_val_batches), or monitor another metric."
                    if trainer.global_step
                    else "Lightning has seen no optimizer step. Step the optimizers that self.optimizers() returns."
                )
                raise MisconfigurationException(f"There is no best checkpoint to test: {reason}")
        content = {
            "epochs": self._epoch,
            "seconds": self._seconds,
            "parameters": _count_parameters(trainer, pl_module),
            "weights": self._weights,
            "optimizers": self._optimizers,
            **({} if self._schedulers is None else {"schedulers": self._schedulers}),
            "methods": self._methods,
            "logged": sorted({*self._logged, *trainer.callback_metrics, *trainer.logged_metrics}),
            # By these, a log that is damaged later is told from a whole one.
            LOGGED_EPOCHS: self._logged_epochs,
            "logged_numbers": count_numbers(Run("", self.seed, self.folder)),
        }
        write_json(self.folder / "fit.json", {**content, **_environment(trainer)})

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if others := self._other_settings(trainer) or self._other_checkpoint(trainer):
            rank_zero_warn(
                f"{self.folder / 'test.json'} is not changed, because this test differs from the study's: {others}."
            )
        elif trainer.is_global_zero:
            # Training may log a metric of the same name.
            taken = (read_json(self.folder / "fit.json") or {}).get("logged", [])
            metrics = {
                f"test/{name}" if name in taken else name: float(value)
                for name, value in trainer.callback_metrics.items()
            }
            write_json(self.folder / "test.json", {"checkpoint": self._tested, "metrics": metrics})

    def _find_adapter(self, trainer: pl.Trainer, module: pl.LightningModule) -> GradientAdapter | None:
        """Return what knows where the gradients are; ``None``, with a warning, if they cannot be measured."""
        callbacks: Any = getattr(trainer, "callbacks", ())
        support = find_support(trainer.strategy)
        is_trusted = any(getattr(callback, "allow_untested_strategy", False) for callback in callbacks)
        is_plain = support is not None and not support.shards_gradients
        if not (is_trusted or is_plain or is_tested(type(trainer.strategy))):
            rank_zero_warn(
                f"There will be no curve of gradient norms, because {type(trainer.strategy).__name__} is not one of "
                "the tested strategies: if it leaves gradients where Lightning's do, add "
                "GradientMonitor(allow_untested_strategy=True) to the experiment"
            )
            return None
        try:
            return gradient_adapter(module, trainer.strategy)
        except UnsupportedGradientError as error:
            rank_zero_warn(f"There will be no curve of gradient norms: {error}")
            return None

    def _other_settings(self, trainer: pl.Trainer) -> str:
        """Return what was given beside the run's own settings and checkpoints, as typed; empty if nothing was."""
        own = os.path.realpath(self.folder / "run.yaml")
        files = (path for path in getattr(trainer, "config_files", ()) if os.path.realpath(path) != own)
        words = [*(word for path in files for word in ("--config", str(path))), *getattr(trainer, "flags", ())]
        folder, name = os.path.split(os.path.realpath(trainer.ckpt_path or ""))
        is_own = folder == os.path.realpath(self.folder / "checkpoints")
        # After SLURM has requeued a job, Lightning resumes from a checkpoint that it names itself.
        if trainer.ckpt_path and not is_own and not name.startswith("hpc_ckpt_"):
            words += ["--ckpt_path", str(trainer.ckpt_path)]
        return shlex.join(words)

    def _other_checkpoint(self, trainer: pl.Trainer) -> str:
        """Return the name of the tested checkpoint, if it is not the one that the study tests."""
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


def _log(trainer: pl.Trainer, metrics: dict[str, Any], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics={**metrics, "epoch": trainer.current_epoch}, step=step)
        logger.save()


def _methods(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, list[str]]:
    """Return the gradient methods at work: callbacks that were given or added, and optimizers with one attached."""
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
    """Return an optimizer's class and the settings of its groups, such as ``SGD(lr=0.1, momentum=0.9)``."""
    groups = []
    for group in optimizer.param_groups:
        shown = {**getattr(optimizer, "defaults", {}), **group}  # in the same order for all groups
        shown["lr"] = group.get("initial_lr", group.get("lr"))  # a scheduler may have changed it already
        for key in ("params", "initial_lr"):
            shown.pop(key, None)
        values = (f"{key}={_plain(value)}" for key, value in shown.items() if value is not None and value is not False)
        groups.append(", ".join(values))
    return f"{type(optimizer).__name__}({'; '.join(dict.fromkeys(groups))})"


def _described_schedule(config: Any) -> str:
    """Return a learning-rate scheduler and when it steps, such as ``StepLR(step_size=2, gamma=0.1) every epoch``."""
    every = config.interval if config.frequency == 1 else f"{config.frequency} {config.interval}s"
    return f"{_described_scheduler(config.scheduler)} every {every}"


def _described_scheduler(scheduler: Any) -> str:
    """Return a scheduler's class and those of its arguments that it keeps and that are plain values."""
    try:
        parameters, found = inspect.signature(type(scheduler)).parameters, vars(scheduler)
    except (TypeError, ValueError):  # a class of a user's own may have neither
        return type(scheduler).__name__
    names = [name for name in parameters if name not in ("optimizer", "last_epoch")]
    kept = {name: _plain(found[name]) for name in names if name in found}
    values = [f"{name}={value}" for name, value in kept.items() if isinstance(value, bool | int | float | str | list)]
    # Those that SequentialLR and ChainedScheduler are made of.
    inner = map(_described_scheduler, found["_schedulers"] if isinstance(scheduler, _COMPOSED) else ())
    return f"{type(scheduler).__name__}({', '.join([*inner, *values])})"


def _plain(value: Any) -> Any:
    if isinstance(value, Counter):  # MultiStepLR's milestones
        return sorted(value.elements())
    return value.tolist() if isinstance(value, Tensor) else value


def _count_parameters(trainer: pl.Trainer, module: pl.LightningModule) -> int:
    """Return the number of weights of a model, with all parts of those that a strategy shards."""
    if shards_gradients(trainer.strategy):
        with suppress(UnsupportedGradientError):
            shapes = [slot.shape for slot in gradient_adapter(module, trainer.strategy).slots()]
            return sum(shape.numel() for shape in shapes if shape is not None)
    return sum(parameter.numel() for parameter in module.parameters())


def _fingerprint(module: pl.LightningModule) -> str:
    """Return a name for weights by their content, which tells whether methods began with the same weights."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        if not is_lazy(parameter):
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _environment(trainer: pl.Trainer) -> dict[str, Any]:
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
