"""Trains the network in a scenario, in one process of several, and records what it sees.

python -m tests.strategies.training DIRECTORY SCENARIO [SCENARIO ...]    one after the other, in one process
"""

import csv
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_znorm import GradientCentralizationCallback, GradientMonitor, SINGCallback, ZNormCallback
from lightning_znorm.compare.recorder import Recorder
from lightning_znorm.compare.results import GRADIENT_NORM
from lightning_znorm.gradients import UnsupportedGradientError
from tests.strategies.network import batch_of, loss_of
from tests.strategies.scenarios import ALL, Scenario
from tests.strategies.strategies import Weights, deepspeed_gradients, deepspeed_model_weights

STEPS = 3  # of each run
LEARNING_RATE = 0.1
SECOND_LEARNING_RATE = 0.03  # of the second group of parameters
MOMENTUM = 0.9

CALLBACKS = {
    "znorm": ZNormCallback,
    "adaptive": partial(ZNormCallback, centering="adaptive"),
    "centralization": GradientCentralizationCallback,
    "sing": SINGCallback,
}


class Training(LightningModule):
    """Records the weights around every step, and what else the tests ask for.

    Attributes:
        weights: The weights that the optimizer steps, before the first batch and after each.
        model_weights: The weights of the forward pass, if they are others.
        scales: The loss scale, at the same times.
        metrics: What is logged, at the same times.
        infinite: Whether this process holds a gradient that is not finite, after each batch.
        moved: Names of gradients whose memory changed between the backward pass and the step.
        storages: Number of storages that the gradients share, before each step.
        gradients: The gradients that the callback saw, before each step, times the loss scale.
        collectives: Number of collectives that the callback called, in each of its hooks before a step.
    """

    RECORDED = (
        "weights",
        "model_weights",
        "scales",
        "metrics",
        "infinite",
        "moved",
        "storages",
        "gradients",
        "collectives",
    )

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.automatic_optimization = not self.scenario.is_manual
        self.network = self.scenario.make_network()
        self.weights: list[Weights] = []
        self.model_weights: list[Weights] = []
        self.scales: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.infinite: list[bool] = []
        self.moved: list[str] = []
        self.storages: list[int] = []
        self.gradients: list[Weights] = []
        self.collectives: list[int] = []

    @property
    def scenario(self) -> Scenario:
        return ALL[self.name]

    @property
    def record(self) -> dict[str, Any]:
        """Return what this process saw."""
        return {key: getattr(self, key) for key in self.RECORDED}

    def configure_model(self) -> None:
        if self.scenario.parallelize is not None:
            self.scenario.parallelize(self.network, self.device_mesh)
        elif self.scenario.kind == "FSDP" and not self.automatic_optimization:
            # If Lightning wraps this module, FSDP does not allow a backward pass within its forward pass.
            self.network = wrap(self.network)

    def training_step(self, number: Tensor) -> Tensor:
        scenario = self.scenario
        batch = self.current_epoch * STEPS * scenario.accumulate + int(number)
        share = self.global_rank * scenario.shares // scenario.processes
        dtype = torch.float64 if scenario.precision == "64-true" else torch.float32
        images, labels = (tensor.to(self.trainer.strategy.root_device) for tensor in batch_of(batch, share, dtype))
        is_last = self.global_rank == scenario.processes - 1
        overflows = is_last and batch == scenario.overflowing_batch
        self.network.is_last = is_last
        self.network.head.overflows = overflows and scenario.overflowing == "last parameter"
        loss = loss_of(self.network, images, labels)
        if overflows and scenario.overflowing == "all parameters":
            loss = loss * 1e38
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for index, optimizer in enumerate(optimizers):
                if index == 0 or batch % 2 == 1:
                    optimizer.step()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        scenario = self.scenario
        module = self.trainer.model if scenario.flat_parameters else self
        tied = set(self.network.tied.parameters())
        params = [param for param in module.parameters() if param.requires_grad]
        parts = [[param for param in params if (param in tied) == second] for second in (False, True)]
        if scenario.is_manual and not scenario.one_optimizer:
            return [torch.optim.SGD(part, LEARNING_RATE, fused=scenario.is_fused) for part in parts]
        if scenario.optimizer == "momentum":
            groups = [{"params": parts[0]}, {"params": parts[1], "lr": SECOND_LEARNING_RATE}]
            return [torch.optim.SGD(groups, LEARNING_RATE, momentum=MOMENTUM)]
        return [torch.optim.SGD(params, LEARNING_RATE, fused=scenario.is_fused)]

    def on_after_backward(self) -> None:
        grads = self.own_gradients()
        self.infinite.append(not all(bool(grad.isfinite().all()) for grad in grads.values()))
        self.addresses = {name: grad.data_ptr() for name, grad in grads.items()}

    # Lightning calls the callbacks' hook before the module's.
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        grads = self.own_gradients()
        self.moved += [name for name, grad in grads.items() if grad.data_ptr() != self.addresses.get(name)]
        self.storages.append(len({grad.untyped_storage().data_ptr() for grad in grads.values()}))

    def own_gradients(self) -> Weights:
        """Return what this process holds of the gradients."""
        grads = {name: p.grad for name, p in self.trainer.model.named_parameters() if p.grad is not None}
        return {name: grad.to_local() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}

    def on_train_start(self) -> None:
        self.write_down()

    def on_train_batch_end(self, *_: Any) -> None:
        self.write_down()

    def write_down(self) -> None:
        self.weights.append(_copied(self.scenario.gather(self)))
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        if self.scenario.kind == "DeepSpeed":
            self.model_weights.append(_copied(deepspeed_model_weights(self)))
            scale = float(getattr(self.trainer.model.optimizer, "loss_scale", 1.0))
        self.scales.append(scale)
        self.metrics.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


def _copied(weights: Weights) -> Weights:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}


class ShownGradients(Callback):
    """Records the averaged gradients that the next callback will see."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, Training)
        if trainer.model.is_gradient_accumulation_boundary():
            pl_module.gradients.append(_copied(deepspeed_gradients(pl_module)))


class CountedCollectives:
    """Counts the collectives between two callbacks' hooks before a step."""

    NAMES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor")

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self.originals: dict[str, Callable[..., Any]] = {}

    @property
    def callbacks(self) -> tuple[Callback, Callback]:
        """Return the callbacks that stand before and after the counted callback."""
        return (
            LambdaCallback(on_before_optimizer_step=lambda *_: self.start()),
            LambdaCallback(on_before_optimizer_step=lambda *_: self.stop()),
        )

    def start(self) -> None:
        self.counts.append(0)
        for name in self.NAMES:
            self.originals[name] = getattr(torch.distributed, name)
            setattr(torch.distributed, name, partial(self.call, name))

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.counts[-1] += 1
        return self.originals[name](*args, **kwargs)

    def stop(self) -> None:
        for name, original in self.originals.items():
            setattr(torch.distributed, name, original)


def callbacks_of(scenario: Scenario, module: Training, directory: Path) -> list[Callback]:
    """Return the callbacks of a scenario's Trainer."""
    if scenario.without_callback:
        return []
    untested = scenario.kind in ("FSDP", "DeepSpeed")
    callback = CALLBACKS[scenario.callback](allow_untested_strategy=untested, **scenario.options)
    callbacks: list[Callback] = [callback]
    if scenario.kind == "DeepSpeed":
        start, stop = CountedCollectives(module.collectives).callbacks
        callbacks = [start, callback, stop]
    if scenario.shows_gradients:
        callbacks.insert(0, ShownGradients())
    if scenario.monitored:
        callbacks.append(GradientMonitor(per_parameter=True, allow_untested_strategy=untested))
        callbacks.insert(0, Recorder(str(directory / f"{module.name}-run"), seed=0))
    return callbacks


def recorded_norms(directory: Path) -> list[float]:
    """Return the norms of gradients that a study's recorder has logged there, in the order of the steps."""
    with next(directory.rglob("metrics.csv")).open() as file:
        return [float(row[GRADIENT_NORM]) for row in csv.DictReader(file) if row[GRADIENT_NORM]]


def train(name: str, directory: Path, module: Training | None = None, strategy: Any = None) -> dict[str, Any]:
    """Train in one scenario, and return what this process saw.

    Args:
        name: The scenario's.
        directory: Folder of checkpoints, in which those of other scenarios are.
        module: What is trained, if not a new one.
        strategy: The Trainer's strategy, if not the scenario's.
    """
    torch.backends.cudnn.allow_tf32 = False  # the reference has more digits
    scenario, module = ALL[name], module or Training(name)
    record: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            accelerator=scenario.device,
            devices=scenario.processes,
            strategy=strategy or scenario.strategy(scenario.processes, scenario.device),
            precision=scenario.precision if scenario.plugin is None else None,
            plugins=None if scenario.plugin is None else [scenario.plugin(scenario.device)],
            accumulate_grad_batches=scenario.accumulate,
            gradient_clip_val=scenario.clip,
            use_distributed_sampler=False,  # each process gets all numbers of batches, and makes its own images
            max_epochs=scenario.epochs + (scenario.resumes is not None),
            callbacks=callbacks_of(scenario, module, directory),
            log_every_n_steps=1,
            default_root_dir=directory,
            logger=CSVLogger(directory, f"{name}-logs") if scenario.monitored else False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        checkpoint = None if scenario.resumes is None else directory / f"{scenario.resumes}.ckpt"
        try:
            trainer.fit(module, DataLoader(range(STEPS * scenario.accumulate)), ckpt_path=checkpoint)
        except UnsupportedGradientError as error:
            if scenario.refused is None:
                raise
            record["refused"] = str(error)
        if scenario.monitored and trainer.is_global_zero:
            record["norms"] = recorded_norms(directory / f"{name}-logs")
            record["parameters"] = json.loads((directory / f"{name}-run/fit.json").read_text())["parameters"]
        if scenario.saves:
            trainer.save_checkpoint(directory / f"{name}.ckpt")
    record |= module.record
    record["warnings"] = [str(warning.message) for warning in caught]
    return record


def train_all(names: Sequence[str], directory: Path) -> None:
    """Train in one scenario after the other, and write down what this process saw in each, or why it failed."""
    records: dict[str, dict[str, Any] | str] = {}
    for name in names:
        try:
            records[name] = train(name, directory)
        except Exception as error:
            records[name] = f"{type(error).__name__}: {error}"
        torch.save(records, directory / "records.pt")  # at once: what follows may end the process


if __name__ == "__main__":
    train_all(sys.argv[2:], Path(sys.argv[1]))
