"""Pretrained encoders under Lightning's fine-tuning callbacks: which part is frozen, what the optimizer gets, resuming.

`lightning.pytorch.callbacks.BackboneFinetuning` freezes ``pl_module.backbone``, and adds it to the optimizer at an
epoch. It relies on the module in two points that are easy to miss:

- The optimizer must start without the frozen parameters. If it has them, Lightning adds no group for the encoder, and
  then sets the learning rate of the whole network where it means the encoder's.
- A training that is resumed begins frozen again. Lightning restores the optimizer's groups, but not ``requires_grad``.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_znorm.errors import ZNormAttributeError, ZNormValueError

_ENCODERS = ("encoder", "backbone")
_CLASSIFIERS = ("fc", "classifier", "head")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def encoder_of(network: nn.Module) -> nn.Module:
    """Return the part of a network that is pretrained: its encoder, or a classifier without its last layer.

    The encoder is looked for as ``encoder`` (MONAI's ``FlexibleUNet``, segmentation_models_pytorch) and as ``backbone``
    (torchvision's segmentation). The last layer of a classifier is what ``get_classifier()`` returns (timm), or else
    ``fc``, ``classifier`` or ``head``; the other parts come in a new `torch.nn.ModuleList`, which shares the network's
    parameters and cannot be called.

    Args:
        network: The network.

    Raises:
        AttributeError: If the network has none of these.

    Example:
        >>> from lightning_znorm.models import resnet20
        >>> len(list(encoder_of(resnet20()).parameters())), len(list(resnet20().parameters()))
        (57, 59)
    """
    for name in _ENCODERS:
        if isinstance(encoder := getattr(network, name, None), nn.Module):
            return encoder
    last = _last_layers(network)
    parts = list(_parts_without(network, set(last))) if last else []
    if not parts:
        raise ZNormAttributeError(
            f"{type(network).__name__} has no part that is known as its encoder. Looked for: {', '.join(_ENCODERS)}; "
            f"and, to take the other parts, for the last layer as get_classifier(), {', '.join(_CLASSIFIERS)}. Give "
            "the network one of these as an attribute, or take a network that has one."
        )
    return nn.ModuleList(parts)


def trainable_parameters(module: LightningModule, trainer: Trainer | None) -> Iterable[nn.Parameter]:
    """Return the parameters with which the optimizer starts: under a fine-tuning callback, those that are not frozen.

    Args:
        module: The LightningModule.
        trainer: Its Trainer, if it has one.

    Raises:
        ValueError: If all parameters are frozen.
    """
    if not fine_tuning_callbacks(trainer):
        return module.parameters()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        names = " and ".join(type(callback).__name__ for callback in fine_tuning_callbacks(trainer))
        raise ZNormValueError(f"{names} has frozen all parameters of the network: leave some of them to train.")
    return trained


def fine_tuning_callbacks(trainer: Trainer | None) -> list[BaseFinetuning]:
    """Return the callbacks of a Trainer that freeze parameters and unfreeze them in the course of the training."""
    callbacks: Any = trainer  # Lightning does not declare its callbacks
    return [each for each in getattr(callbacks, "callbacks", ()) if isinstance(each, BaseFinetuning)]


def check_processes(trainer: Trainer) -> None:
    """Refuse to unfreeze an encoder in several processes.

    Strategies look at a training's parameters once, before the first step. DistributedDataParallel never averages the
    gradients of those that were frozen then, also with ``find_unused_parameters``: each process would go on with an
    encoder of its own.

    Args:
        trainer: The Trainer, before its training.

    Raises:
        ValueError: If `BackboneFinetuning` would unfreeze the encoder in a training of several processes.
    """
    if trainer.world_size == 1:
        return
    epochs = trainer.max_epochs
    for callback in fine_tuning_callbacks(trainer):
        if not isinstance(callback, BackboneFinetuning):
            continue
        start = callback.unfreeze_backbone_at_epoch
        if epochs is None or epochs < 0 or start < epochs:
            raise ZNormValueError(
                f"{type(callback).__name__} unfreezes the encoder at epoch {start}, and this training has "
                f"{trainer.world_size} processes: their encoders would part without a word, because gradients of "
                "parameters that were frozen at the start are not averaged. Train on one device (Trainer(devices=1)); "
                "or train the encoder from the start, without this callback; or first train on one device until the "
                "encoder is unfrozen, and begin a training of all devices with its weights."
            )


def frozen_parameters(module: LightningModule, trainer: Trainer) -> frozenset[str]:
    """Return the names of parameters that must stay frozen: in several processes, those that are frozen at the start.

    Args:
        module: The LightningModule, after the ``setup`` of all callbacks.
        trainer: Its Trainer.
    """
    if trainer.world_size == 1 or not fine_tuning_callbacks(trainer):
        return frozenset()
    return frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad)


def check_still_frozen(module: LightningModule, trainer: Trainer, frozen: frozenset[str]) -> None:
    """Refuse what a fine-tuning callback of the user's has unfrozen in several processes.

    Args:
        module: The LightningModule, at the start of an epoch.
        trainer: Its Trainer.
        frozen: What `frozen_parameters` returned.

    Raises:
        ValueError: If one of these parameters is not frozen any more, and the strategy is DistributedDataParallel.
    """
    if not frozen or not isinstance(trainer.strategy, DDPStrategy):
        return
    unfrozen = [name for name, each in module.named_parameters() if name in frozen and each.requires_grad]
    if unfrozen:
        names = " and ".join(type(callback).__name__ for callback in fine_tuning_callbacks(trainer))
        raise ZNormValueError(
            f"{names} has unfrozen {unfrozen[0]} in a training of {trainer.world_size} processes: the processes would "
            "part without a word, because gradients of parameters that were frozen at the start are not averaged. "
            "Train on one device (Trainer(devices=1)), or freeze for the whole training what is frozen at its start."
        )


def check_scheduler(make: Callable[..., Any], trainer: Trainer | None) -> None:
    """Refuse a scheduler of the learning rate that raises when the encoder joins the optimizer as a further group.

    The scheduler is tried out on an optimizer of one parameter, to which a second one is added.

    Args:
        make: Makes the scheduler from the optimizer.
        trainer: The Trainer, if there is one.

    Raises:
        ValueError: If the scheduler cannot step an optimizer to which a group has been added.
    """
    if not any(isinstance(callback, BackboneFinetuning) for callback in fine_tuning_callbacks(trainer)):
        return
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        metric = [0.0] if isinstance(scheduler, ReduceLROnPlateau) else []
        optimizer.step()
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.01})
        try:
            scheduler.step(*metric)
        except (KeyError, IndexError, ValueError) as error:
            raise ZNormValueError(
                f"{type(scheduler).__name__} would end this training with an error at the epoch at which "
                "BackboneFinetuning unfreezes the encoder: it cannot follow an optimizer that gets a further group of "
                f"parameters ({type(error).__name__}: {error}). Take a scheduler that computes each rate from the one "
                "before, such as StepLR, MultiStepLR, ExponentialLR, CosineAnnealingLR, LinearLR or ReduceLROnPlateau."
            ) from error


def resume(module: LightningModule, trainer: Trainer) -> None:
    """Do for fine-tuning callbacks what Lightning leaves out when a training is resumed.

    What was unfrozen before the checkpoint is unfrozen again: the parameters that the restored optimizers step. And if
    the checkpoint was saved after the last batch of an epoch, the callbacks are told that the next epoch starts.

    Args:
        module: The LightningModule, whose weights and optimizers have been restored.
        trainer: Its Trainer.

    Raises:
        ValueError: If `BackboneFinetuning` has missed its epoch: the checkpoint is of a training without it, or that
            would have unfrozen the encoder later.
    """
    callbacks = fine_tuning_callbacks(trainer)
    if not callbacks:
        return
    for callback in callbacks:
        if isinstance(callback, BackboneFinetuning):
            _require_unfrozen(callback, trainer.current_epoch)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    for part in module.modules():
        frozen = [parameter for parameter in part.parameters(recurse=False) if not parameter.requires_grad]
        unfrozen = [parameter for parameter in frozen if id(parameter) in stepped]
        for parameter in unfrozen:
            parameter.requires_grad = True
        if unfrozen and isinstance(part, _BATCH_NORMS):
            part.track_running_stats = True  # as Lightning does when it unfreezes a layer
    if _skips_start_of_epoch(trainer):
        for callback in callbacks:
            callback.on_train_epoch_start(trainer, module)


def _require_unfrozen(callback: BackboneFinetuning, epoch: int) -> None:
    start = callback.unfreeze_backbone_at_epoch
    if callback.previous_backbone_lr is None and epoch > start:
        raise ZNormValueError(
            f"{type(callback).__name__} unfreezes the encoder at epoch {start}, and the training of the checkpoint has "
            f"not done so until epoch {epoch}, where it goes on: set unfreeze_backbone_at_epoch to {epoch} or more, or "
            "leave the callback out if the encoder was never frozen."
        )


def _skips_start_of_epoch(trainer: Trainer) -> bool:
    """Return whether Lightning will begin the next epoch without the hook ``on_train_epoch_start``.

    It does if the checkpoint was saved after the last batch of an epoch, as `ModelCheckpoint(every_n_train_steps=...)`
    may do: it goes on with the next epoch, and still takes it for the rest of the one that was interrupted.
    """
    loop: Any = trainer.fit_loop  # what it tells of a restart is not declared in all releases
    batches = loop.epoch_loop
    after_last = getattr(batches, "restarted_on_train_batch_end", False) and batches.batch_progress.is_last_batch
    return bool(after_last and getattr(loop, "restarted_mid_epoch", False))


def _last_layers(network: nn.Module) -> list[nn.Module]:
    """Return the last layer of a classifier; timm's distilled networks have two."""
    get_classifier = getattr(network, "get_classifier", None)
    if callable(get_classifier):
        found = get_classifier()
        layers = list(found) if isinstance(found, (tuple, list)) else [found]
    else:
        layers = [getattr(network, name, None) for name in _CLASSIFIERS]
    return [layer for layer in layers if isinstance(layer, nn.Module) and any(True for _ in layer.parameters())]


def _parts_without(module: nn.Module, excluded: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the largest parts of a module that hold none of the excluded modules."""
    for child in module.children():
        if child in excluded:
            continue
        if excluded.isdisjoint(child.modules()):
            yield child
        else:
            yield from _parts_without(child, excluded)
    # Such as the class token of a vision transformer.
    if direct := list(module.named_parameters(recurse=False)):
        holder = nn.Module()  # Lightning cannot read a `torch.nn.ParameterList`
        for name, parameter in direct:
            holder.register_parameter(name, parameter)
        yield holder
