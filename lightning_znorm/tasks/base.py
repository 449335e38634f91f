"""The base of all tasks: the network, the optimizer and its scheduler, checked targets, and what is logged."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_znorm.arguments import checked_flag
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import PlainHyperparameters, plain_values, python_scalars
from lightning_znorm.metrics.mask_metric import at_least_float32
from lightning_znorm.tasks import fine_tuning
from lightning_znorm.tasks.prior import (
    Prior,
    checked_prior,
    find_output_biases,
    set_biases,
    shape_of_images,
    shares_of_data,
)
from lightning_znorm.tasks.random_states import SavesRandomStates
from lightning_znorm.tasks.targets import TargetCheck

BUILD_IT = "build the network yourself and pass it as the model"
"""What a message advises for arguments of a network that are not plain values."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format of a tensor by its number of dimensions; others have one format only."""


class Task(PlainHyperparameters, SavesRandomStates):
    """Base of the tasks.

    Checkpoints hold the random states of all processes. A training that is resumed restores them, so dropout and
    augmentations draw what they would have drawn.

    The values of targets are checked in every batch. A single process on the CPU raises at once. On other devices,
    reading a value would make the step wait. Among several processes, one that raises would leave the others waiting.
    In both cases the loss of a batch with a wrong target is 0, so that it has no gradient, and all processes raise
    together: after the first batch of training, at the end of each epoch and evaluation, and in a single process also
    after the first batch of an evaluation.

    A subclass sets ``criterion`` (the loss) and ``target_check``, and calls ``super()`` in the hooks that it overrides.

    Args:
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning rate scheduler from the optimizer; none by default. A
            `lightning.pytorch.cli.ReduceLROnPlateau` follows the metric that it names as its ``monitor``, torch's own
            follows ``val/loss``.
        lr_scheduler_interval: Whether the scheduler steps after every epoch, or after every optimizer step.
        lr_scheduler_frequency: The scheduler steps after every so many of these; see the tasks for the default.
        lr_scheduler_strict: Whether it is an error if a plateau scheduler's metric is missing; otherwise the scheduler
            waits, and there is a warning.

    Raises:
        ValueError: If ``lr_scheduler_frequency`` is less than 1.
        TypeError: If ``optimizer`` or ``lr_scheduler`` cannot be called.
    """

    criterion: nn.Module
    target_check: TargetCheck
    # Of the class, so that tasks that were pickled before there was a prior have them too.
    _prior: list[float] | Literal["auto"] | None = None
    _num_logits = 0
    _uses_softmax = False
    _channels_last = False
    _frozen: frozenset[str] = frozenset()  # names of parameters that must stay frozen
    _is_resumed = False  # whether a checkpoint of a training has been loaded to go on with
    _has_started = False  # whether the weights are those of a training, and no longer the initial ones
    _loaded: frozenset[str] = frozenset()  # names of weights that have been loaded
    _prior_note = ""  # what to say when the training starts

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_scheduler_interval: Literal["epoch", "step"],
        lr_scheduler_frequency: int | None = None,
        lr_scheduler_strict: bool = True,
    ) -> None:
        super().__init__()
        _require_maker("optimizer", "parameters", "partial(torch.optim.SGD, lr=0.1)", optimizer)
        if lr_scheduler is not None:
            example = "partial(torch.optim.lr_scheduler.StepLR, step_size=5)"
            _require_maker("lr_scheduler", "optimizer", example, lr_scheduler)
        interval, frequency, strict = plain_values(
            lr_scheduler_interval=lr_scheduler_interval,
            lr_scheduler_frequency=lr_scheduler_frequency,
            lr_scheduler_strict=lr_scheduler_strict,
        )
        if frequency is not None and frequency < 1:
            raise ZNormValueError(f"lr_scheduler_frequency must be at least 1, got {frequency}.")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = interval
        self.lr_scheduler_frequency = frequency
        self.lr_scheduler_strict = strict
        self._total_steps: int | None = None
        self._metrics_of_loaders: dict[tuple[str, int], MetricCollection] = {}

    def __getattr__(self, name: str) -> Any:
        """Return the network's encoder as ``backbone``, which Lightning's `BackboneFinetuning` freezes and unfreezes.

        `lightning_znorm.tasks.fine_tuning.encoder_of` says where it is looked for. What a subclass has set as
        ``self.backbone`` comes first.

        Raises:
            AttributeError: If no encoder is found, or for any other name.
        """
        if name == "backbone":
            children = dict(self.named_children())
            if "model" in children and name not in children:
                return fine_tuning.encoder_of(self.model)
        return super().__getattr__(name)

    def configure_network(
        self,
        model: str | nn.Module,
        create: "partial[nn.Module]",
        kwargs: dict[str, Any],
        compile: bool,
        channels_last: bool = False,
    ) -> None:
        """Set the network, as ``self.model``.

        Args:
            model: The network, or its name.
            create: Makes the network from its name and ``kwargs``. It holds the arguments that the task sets itself.
            kwargs: Arguments of a network by name.
            compile: Whether to compile the network in place.
            channels_last: Whether its weights, and the images for :meth:`run_network`, are in channels-last format.

        Raises:
            ValueError: If ``kwargs`` come with a module or hold an argument that the task sets itself, or if the
                network by name would have no channels.
            TypeError: If ``channels_last`` is neither ``True`` nor ``False``.
        """
        self._channels_last = checked_flag("channels_last", channels_last)
        self._in_chans: int | None = None
        if isinstance(model, str):
            self._in_chans = create.keywords["in_chans"]
            if self._in_chans < 1:
                raise ZNormValueError(f"in_chans must be at least 1, got {self._in_chans}.")
            if twice := [name for name in kwargs if name in create.keywords]:
                raise ZNormValueError(
                    f"model_kwargs must not hold {twice[0]}: set {twice[0]} of {type(self).__name__} itself."
                )
            model = create(model, **kwargs)
        elif kwargs:
            raise ZNormValueError(
                f"model_kwargs are for a model by name, and {type(model).__name__} is a module already."
            )
        if compile:
            model.compile()
        self.model = model
        self._set_memory_format()

    def run_network(self, images: Tensor) -> Any:
        """Return the output of the network, for images in the memory format that the task was given.

        Args:
            images: Shape ``(N, C, ...)``.
        """
        if self._channels_last and images.ndim in _CHANNELS_LAST:
            images = images.to(memory_format=_CHANNELS_LAST[images.ndim])
        return self.model(images)

    def _set_memory_format(self) -> None:
        """Put weights of four and five dimensions into channels-last format, if the task was given that."""
        if not self._channels_last:
            return
        # `Module.to(memory_format=...)` takes one format, and a network may have weights of four and five dimensions.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if is_lazy(tensor) or type(tensor.data) is not Tensor or tensor.ndim not in _CHANNELS_LAST:
                continue
            converted = tensor.data.to(memory_format=_CHANNELS_LAST[tensor.ndim])
            if converted.stride() != tensor.stride():
                tensor.data = converted

    def configure_prior(self, prior: Prior, num_classes: int, softmax: bool) -> None:
        """Note the shares of the classes with which the output biases start; ``None`` leaves the biases alone.

        Args:
            prior: A share, one for each class, or ``"auto"``.
            num_classes: Number of logits.
            softmax: Whether exactly one class is true.

        Raises:
            TypeError: If the prior is of another type.
            ValueError: If a share is out of range, or if there are too few or too many.
        """
        self._prior = checked_prior(prior, num_classes, softmax)
        self._num_logits, self._uses_softmax = num_classes, softmax

    def logits_of_all_outputs(self, images: Tensor) -> Sequence[Tensor]:
        """Return the logits of each of the network's outputs, shape ``(N, num_classes, ...)``; by default of one."""
        return [self(images)]

    def _start_with_prior(self) -> None:
        """Set the output biases, unless they have been loaded or trained."""
        if self._prior is None or self._has_started or self._loaded.issuperset(self.state_dict()):
            return
        source = _source_of_batches(self.trainer)
        datamodule = source.instance if isinstance(source.instance, LightningDataModule) else None
        if isinstance(self.example_input_array, Tensor):
            shape = self.example_input_array.shape
        else:
            shape = shape_of_images(_loader_of(source), self, datamodule)
        biases = find_output_biases(self.model, self.logits_of_all_outputs, shape, self._num_logits)
        new = {f"model.{name}": bias for name, bias in biases.items() if f"model.{name}" not in self._loaded}
        if not new:
            return
        shares = self._prior
        if shares == "auto":
            shares = shares_of_data(datamodule, self._num_logits, self._uses_softmax)
        set_biases(new.values(), shares, self._uses_softmax)
        listed = ", ".join(f"{share:.4g}" for share in shares)
        formula = "log(p)" if self._uses_softmax else "log(p / (1 - p))"
        self._prior_note = (
            f"prior: {', '.join(new)} start{'s' if len(new) == 1 else ''} at {formula} with p = {listed}."
        )

    def check_channels(self, images: Tensor) -> None:
        """Refuse images with another number of channels than a network by name was made for.

        Args:
            images: Shape ``(N, C, ...)``.

        Raises:
            ValueError: If the number of channels differs.
        """
        channels = images.shape[1] if images.ndim > 1 else None
        if self._in_chans is not None and channels not in (self._in_chans, None):
            raise ZNormValueError(
                f"Images of shape {tuple(images.shape)} have {channels} channel{'s' if channels != 1 else ''}, and the "
                f"task was given in_chans={self._in_chans}: make it {channels} (in YAML, model.init_args.in_chans)."
            )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer, and the scheduler if there is one."""
        optimizer = self.optimizer(fine_tuning.trainable_parameters(self, self.attached_trainer))
        if self.lr_scheduler is None:
            return optimizer
        make: Callable[..., Any] = self.lr_scheduler
        interval = self.lr_scheduler_interval
        self._total_steps = None
        if name := _leaves_total_steps_open(make):
            self._total_steps = self._steps_of_training(name)
            make, interval = partial(make, total_steps=self._total_steps), "step"
        fine_tuning.check_scheduler(make, self.attached_trainer)
        scheduler = make(optimizer)
        monitor = getattr(scheduler, "monitor", "val/loss")
        frequency = self.lr_scheduler_frequency
        if frequency is None and isinstance(scheduler, ReduceLROnPlateau) and interval == "epoch":
            # A val/ metric is new only after a validation.
            follows_validation = self.attached_trainer is not None and monitor.startswith("val/")
            frequency = self.trainer.check_val_every_n_epoch if follows_validation else None
        if isinstance(scheduler, OneCycleLR):
            self._warn_of_short_cycle(scheduler, interval, frequency or 1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": interval,
                "frequency": frequency or 1,
                "strict": self.lr_scheduler_strict,
                "monitor": monitor,
            },
        }

    def _warn_of_short_cycle(self, scheduler: OneCycleLR, interval: str, frequency: int) -> None:
        # Torch raises at the first step beyond the cycle, in the middle of the training.
        if self.attached_trainer is None:
            return
        steps: float | None = self.trainer.max_epochs
        if interval == "step":
            steps = self.trainer.estimated_stepping_batches
        steps = 0 if steps is None or steps == math.inf else steps // frequency
        if steps > scheduler.total_steps:
            rank_zero_warn(
                f"OneCycleLR has total_steps={scheduler.total_steps}, and this training steps it up to {int(steps)} "
                "times, at which torch raises an error: raise total_steps, or leave it out to have it set to the "
                "length of the training."
            )

    def _steps_of_training(self, scheduler: str) -> int:
        """Return how many steps of the optimizer the training has, for a scheduler of this name."""
        advice = "give it total_steps (in YAML, model.init_args.lr_scheduler.init_args.total_steps)"
        if self.attached_trainer is None:
            raise ZNormValueError(f"{scheduler} leaves total_steps open, and no Trainer says what they are: {advice}.")
        if self.lr_scheduler_frequency not in (None, 1):
            raise ZNormValueError(
                f"{scheduler} leaves total_steps open, and with lr_scheduler_frequency={self.lr_scheduler_frequency} "
                f"it would not step after each of them: leave that out, or {advice}."
            )
        callbacks: Any = self.trainer  # Lightning does not declare its callbacks
        if any(
            isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()
            for callback in callbacks.callbacks
        ):
            raise ZNormValueError(
                f"{scheduler} leaves total_steps open, and GradientAccumulationScheduler changes how many batches make "
                f"a step: {advice}."
            )
        steps = self.trainer.estimated_stepping_batches
        if not 0 <= steps < math.inf:  # Lightning returns -1 if a loader has no length
            raise ZNormValueError(
                f"{scheduler} leaves total_steps open, and this training has no end: set max_steps of the Trainer, or "
                f"{advice}."
            )
        return max(int(steps), 1)  # a training without steps makes a scheduler too

    # torch has no public hook for conversions: `to`, `half`, `cuda` and the rest all call this method.
    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Task":
        # The loss is computed in float32 or more. So its class weights, kernels and layers keep their precision when
        # Lightning converts the module to half precision: rounded weights would give another loss, and torch refuses
        # to mix precisions.
        kept = [(module, name, old) for module in self._modules_of_loss() for name, old in _tensors(module)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, old in kept:
            new = getattr(module, name)
            if at_least_float32(new) is not new:
                new.data = at_least_float32(old).to(new.device)
        return self

    def _modules_of_loss(self) -> list[nn.Module]:
        """Return the modules of the loss that are not part of the network."""
        criterion, model = getattr(self, "criterion", None), getattr(self, "model", None)  # set by subclasses
        network = set(model.modules()) if isinstance(model, nn.Module) else set()
        if not isinstance(criterion, nn.Module):  # a function
            return []
        return [module for module in criterion.modules() if module not in network]

    @override
    def setup(self, stage: str) -> None:
        """Forget wrong targets that an interrupted run has noted, and set the output biases before a training."""
        for check in self.target_checks:
            check.clear()
        self._set_memory_format()  # of lazy layers, which have got their weights since
        if stage == "fit":
            fine_tuning.check_processes(self.trainer)
            self._frozen = fine_tuning.frozen_parameters(self, self.trainer)
            self._is_resumed = False
            self._start_with_prior()
            self._has_started = True

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights. A later training keeps the output biases among them."""
        self._loaded = self._loaded.union(state_dict)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._set_memory_format()
        return result

    @override
    def on_train_epoch_start(self) -> None:
        """Refuse to train parameters in several processes that were frozen at the start."""
        fine_tuning.check_still_frozen(self, self.trainer, self._frozen)

    @override
    def on_train_epoch_end(self) -> None:
        """Raise on all processes if a target of the epoch was wrong."""
        if self.trainer.world_size > 1:
            # Rank 0's progress bar has all-reduced the epoch's metrics by now. The other ranks must join that first.
            _ = self.trainer.callback_metrics
        self._refuse_noted_targets()

    @override
    def on_validation_epoch_end(self) -> None:
        """Raise on all processes if a target was wrong."""
        self._refuse_noted_targets()

    @override
    def on_test_epoch_end(self) -> None:
        """Raise on all processes if a target was wrong."""
        self._refuse_noted_targets()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random states, and turn NumPy's scalars, such as a learning rate, into Python's.

        A checkpoint that holds NumPy's scalars cannot be loaded.
        """
        for name, content in list(checkpoint.items()):
            if name != "state_dict":
                checkpoint[name] = python_scalars(content)
        super().on_save_checkpoint(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states of the checkpoint, and its output biases, if training is to go on."""
        self._prior_note = ""
        trainer = self.attached_trainer
        self._is_resumed = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        super().on_load_checkpoint(checkpoint)

    @override
    def on_train_start(self) -> None:
        """Refuse a resumed schedule that is too short, and restore the random states.

        Raises:
            ValueError: If the schedule of the training that is resumed ends before this training does, or if
                `BackboneFinetuning` has missed the epoch at which it unfreezes the encoder.
        """
        self._require_long_schedule()
        if self._is_resumed:
            fine_tuning.resume(self, self.trainer)
            fine_tuning.check_still_frozen(self, self.trainer, self._frozen)
        if self._prior_note:
            rank_zero_info(self._prior_note)
            self._prior_note = ""
        self._align_optimizer_states()
        super().on_train_start()

    def _align_optimizer_states(self) -> None:
        """Lay out what optimizers have loaded for weights, such as momentum, as the weights are.

        A checkpoint may be of a task with another ``channels_last``. Fused optimizers of torch read the memory of a
        weight and of its state in order.
        """
        for optimizer in self.trainer.optimizers:
            for weight, state in getattr(optimizer, "state", {}).items():
                for name, value in state.items() if isinstance(state, dict) else ():
                    if not type(value) is type(getattr(weight, "data", None)) is Tensor or value.shape != weight.shape:
                        continue
                    if value.stride() != weight.stride():
                        state[name] = torch.empty_like(weight, dtype=value.dtype, device=value.device).copy_(value)

    def _require_long_schedule(self) -> None:
        if self._total_steps is None:
            return
        for config in self.trainer.lr_scheduler_configs:
            ends = getattr(config.scheduler, "total_steps", None)
            if ends is not None and ends < self._total_steps:
                raise ZNormValueError(
                    f"The {type(config.scheduler).__name__} of the checkpoint ends after {ends} steps, and this "
                    f"training has {self._total_steps}: resume it for as long as it was begun for, or begin a new one."
                )

    @property
    def target_checks(self) -> tuple[TargetCheck, ...]:
        """All checks that are passed to :meth:`check_targets`."""
        return (self.target_check,)

    def check_targets(
        self, targets: Tensor, stage: str, batch_idx: int, *checks: TargetCheck, dataloader_idx: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Raise if a target is out of range: now, or at the end of the epoch if raising now would make processes wait.

        Call it once in a batch: in the first batch, the processes gather what each has found.

        Args:
            targets: The targets of a batch.
            stage: One of `lightning_znorm.tasks.targets.STAGES`.
            batch_idx: Number of the batch in its epoch.
            *checks: Some of ``target_checks``. Default: ``target_check``.
            dataloader_idx: Number of the loader, where there are several.

        Returns:
            Targets from which a loss can be computed. If the check is deferred, also whether the given targets are out
            of range, a bool scalar for :meth:`compute_loss`; otherwise ``None``.

        Raises:
            ValueError: If a target is out of range, and the check is not deferred.
        """
        checks = checks or (self.target_check,)
        if not self.defers_checks(targets.device):
            for check in checks:
                check.require(targets, stage, batch_idx, dataloader_idx)
            return targets, None
        noted = [check.note(targets, stage, batch_idx, dataloader_idx) for check in checks]
        targets, misfit = noted[0]
        for _, other in noted[1:]:
            targets, misfit = targets.masked_fill(other, 0), misfit | other
        # Then a mistake in all data does not cost an epoch. Several processes cannot do so in an evaluation, where one
        # of them may have no batch.
        if batch_idx == 0 and (stage == "training" or self.trainer.world_size == 1):
            self._refuse_noted_targets()
        return targets, misfit

    def defers_checks(self, device: torch.device) -> bool:
        """Return whether the checks of targets wait for the end of the epoch.

        Args:
            device: The device of the targets.
        """
        # Without a Trainer, no hook says when an epoch ends.
        return self.attached_trainer is not None and (self.trainer.world_size > 1 or device.type != "cpu")

    def _refuse_noted_targets(self) -> None:
        if not self.defers_checks(self.device):
            return
        notes = torch.stack([check.notes(self.device) for check in self.target_checks])
        by_rank = [notes]
        if self.trainer.world_size > 1:
            by_rank = [torch.empty_like(notes) for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather(by_rank, notes)
        for check, gathered in zip(self.target_checks, torch.stack(by_rank, dim=1), strict=True):
            check.refuse(gathered)

    def compute_loss(self, logits: Tensor, targets: Tensor, misfit: Tensor | None = None) -> Tensor:
        """Return the loss, computed in float32 or more, whatever the precision of the network.

        Args:
            logits: Logits of the network.
            targets: Targets from which the loss can be computed.
            misfit: Whether the true targets are out of range, a bool scalar. The loss is then 0, without a gradient.
        """
        logits = at_least_float32(logits)
        with torch.autocast(logits.device.type, enabled=False), _default_dtype(logits.dtype):
            loss: Tensor = self.criterion(logits, targets)
        return loss if misfit is None else loss.masked_fill(misfit, 0.0)

    def metrics_of_loader(self, stage: str, metrics: MetricCollection, dataloader_idx: int) -> MetricCollection:
        """Return the metrics of one of several loaders.

        Args:
            stage: One of `lightning_znorm.tasks.targets.STAGES`.
            metrics: The metrics of the first loader.
            dataloader_idx: Number of the loader.

        Returns:
            The given metrics for the first loader, and a copy for each other loader.
        """
        if dataloader_idx == 0:
            return metrics
        key = stage, dataloader_idx
        if key not in self._metrics_of_loaders:
            copied = metrics.clone()
            copied.reset()
            self._metrics_of_loaders[key] = copied
        found = self._metrics_of_loaders[key]
        # A move copies all that has been gathered, so not at every batch.
        if any(metric.device != self.device for metric in found.values(copy_state=False)):
            found.to(self.device)
        return found

    def log_metrics(self, metrics: MetricCollection, batch_size: int, without: Collection[str] = ()) -> None:
        """Log metrics over an epoch and all processes.

        Args:
            metrics: The metrics, updated.
            batch_size: Number of images in the batch.
            without: Names, without a prefix, of metrics that are not logged.
        """
        prefix = len(metrics.prefix or "")
        for name, metric in metrics.items(keep_base=False, copy_state=False):
            if name[prefix:] in without:
                continue
            # Lightning looks for metrics among the attributes, and those of further loaders are not there: name them.
            self.log(
                name,
                metric,
                metric_attribute=name,
                on_step=False,
                on_epoch=True,
                prog_bar=self.shows_in_progress_bar(name[prefix:]),
                batch_size=batch_size,
            )

    def shows_in_progress_bar(self, name: str) -> bool:
        """Return whether the progress bar shows a metric; by default all.

        Args:
            name: Name of the metric, without ``val/`` or ``test/``.
        """
        return True

    def log_loss(self, name: str, loss: Tensor, batch_size: int) -> None:
        """Log the mean of a loss over an epoch and all processes."""
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=batch_size, sync_dist=True)


def _require_maker(name: str, of: str, example: str, given: object) -> None:
    """Refuse what cannot be called, such as an optimizer in place of what makes one."""
    if not callable(given):
        found = "None" if given is None else f"an object of {type(given).__name__}"
        raise ZNormTypeError(f"{name} must be a function that makes one from the {of}, such as {example}, got {found}.")


def _source_of_batches(trainer: Any) -> Any:
    """Return where the training batches come from.

    Lightning names their loader in public only after ``setup``, and its ``datamodule`` may be that of an earlier
    training.
    """
    return trainer.fit_loop._data_source


def _loader_of(source: Any) -> Any:
    """Return the loader of the training batches, and restore the attributes of who makes it: some draw orders then."""
    if not source.is_module():
        return source.dataloader()
    maker = source.instance
    attributes = dict(vars(maker))
    try:
        with isolate_rng():
            return source.dataloader()
    finally:
        vars(maker).clear()
        vars(maker).update(attributes)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the floating-point parameters and buffers of a module, without those of its submodules."""
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor.detach()) for name, tensor in named if tensor.is_floating_point()]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Change torch's default type for tensors that a loss makes, such as the kernel of MONAI's SSIMLoss."""
    before = torch.get_default_dtype()
    if dtype == before:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _leaves_total_steps_open(make: Callable[..., object]) -> str:
    """Return the scheduler's name if it needs the number of steps of the training and was not given it, else ""."""
    factory: Any = make
    given: dict[str, object] = {}
    if isinstance(make, partial):
        given, factory = make.keywords, make.func
        if (factory.__module__ or "").startswith("jsonargparse."):  # its function takes the class as an argument
            factory = next((part for part in make.args if isinstance(part, type)), factory)
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a builtin
        return ""
    if "total_steps" not in parameters:
        return ""
    values = {name: parameter.default for name, parameter in parameters.items()} | given
    lengths = [values.get(name) for name in ("total_steps", "epochs", "steps_per_epoch")]
    is_open = all(value is None or value is inspect.Parameter.empty for value in lengths)
    name: str = getattr(factory, "__name__", type(factory).__name__)
    return name if is_open else ""
