"""The prior: output biases that start at what the share of each class asks for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import BatchSampler, DataLoader

from lightning_znorm.arguments import shown
from lightning_znorm.batches import images_of
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_value

Prior: TypeAlias = float | list[float] | Literal["auto"] | None
"""How frequent the classes are: a share, one for each class, or ``"auto"``, which asks the data module."""

# Shares that a user has rounded add up to this much more or less than 1.
_TOLERANCE = 0.02


def plain_prior(prior: Any) -> Any:
    """Return a prior that is a tensor as a number or a list, and any other as it is."""
    return prior.tolist() if isinstance(prior, Tensor) else prior


def checked_prior(prior: Any, num_classes: int, softmax: bool) -> list[float] | Literal["auto"] | None:
    """Return the share of each class, ``"auto"``, or ``None``.

    Args:
        prior: What the user passed: a share, or one for each of the logits.
        num_classes: Number of logits.
        softmax: Whether exactly one class is true. The share of class 1 is then enough for two classes.

    Raises:
        TypeError: If it is something else, or holds something else than numbers.
        ValueError: If a share is not between 0 and 1, if there are too few or too many, or if they do not add up to 1
            where exactly one class is true.
    """
    prior = plain_value("prior", prior)
    if prior is None:
        return None
    if isinstance(prior, str) and prior == "auto":
        return "auto"
    shares = list(prior) if isinstance(prior, (list, tuple)) else [prior]
    if not all(isinstance(share, (int, float)) and not isinstance(share, bool) for share in shares):
        raise ZNormTypeError(f"prior must be a share, a list of one for each class, or 'auto', got {shown(prior)}.")
    if not all(0 < share < 1 for share in shares):
        raise ZNormValueError(f"prior is the share of a class, in (0, 1), got {shown(prior)}.")
    if not isinstance(prior, (list, tuple)):
        if softmax and num_classes > 2:
            raise ZNormValueError(f"prior must be a list of the shares of all {num_classes} classes, got {prior}.")
        shares = [1 - prior, prior] if softmax else [prior] * num_classes
    if len(shares) != num_classes:
        raise ZNormValueError(
            f"prior holds {len(shares)} share{'s' if len(shares) != 1 else ''}, and num_classes={num_classes} asks for "
            f"{num_classes}: {shown(prior)}."
        )
    if softmax and abs(sum(shares) - 1) > _TOLERANCE:
        raise ZNormValueError(f"prior holds the shares of all classes, and they add up to {sum(shares):.4g}, not 1.")
    return [float(share) for share in shares]


def shares_of_data(datamodule: Any, num_classes: int, softmax: bool) -> list[float]:
    """Return the share of each class in a data module's training labels or masks.

    Args:
        datamodule: The data module of the training, if it has one, after its ``setup``.
        num_classes: Number of logits. One logit stands for the second of two classes.
        softmax: Whether exactly one class is true. A single share is then that of the second of two classes.

    Raises:
        TypeError: If the data module's ``class_frequencies`` is no method, or returns no list of numbers.
        ValueError: If there is no data module that counts its classes, or if it counts others, or what is no share, or
            if a class is never or always there.
    """
    name = type(datamodule).__name__
    if datamodule is None or not hasattr(datamodule, "class_frequencies"):
        missing = "there is no data module" if datamodule is None else f"{name} has no class_frequencies()"
        raise ZNormValueError(
            f"prior='auto' counts the classes in the data module's training set, and {missing}: give the shares "
            "yourself, such as prior=0.01."
        )
    method: Any = datamodule.class_frequencies
    returned: Any = method() if callable(method) else method
    try:
        shares = [float(share) for share in returned]
    except (TypeError, ValueError):
        shares = []
    if not callable(method) or isinstance(returned, Mapping) or not shares:
        raise ZNormTypeError(
            f"prior='auto' asks the method {name}.class_frequencies for a list of the share of each class, and got "
            f"{shown(returned)}."
        )
    if num_classes == 1 and len(shares) == 2:
        shares = shares[1:]
    if num_classes == 2 and softmax and len(shares) == 1:
        shares = [1 - shares[0], shares[0]]
    if len(shares) != num_classes:
        raise ZNormValueError(
            f"prior='auto': {name} counts {len(shares)} class{'es' if len(shares) != 1 else ''}, and the task was "
            f"given num_classes={num_classes}."
        )
    adds_up = not softmax or abs(sum(shares) - 1) <= _TOLERANCE
    if not adds_up or not all(0 <= share <= 1 for share in shares):
        raise ZNormValueError(
            f"prior='auto': class_frequencies() of {name} returned {shown(returned)}, and shares between 0 and 1"
            f"{' that add up to 1' if softmax else ''} are expected."
        )
    for number, share in enumerate(shares):
        if not 0 < share < 1:
            which = "the class" if num_classes == 1 else f"class {number}"
            raise ZNormValueError(
                f"prior='auto': {which} makes {share:.0%} of {name}'s training set, which no bias predicts: give the "
                "shares yourself, such as prior=0.01."
            )
    return shares


def set_biases(biases: Iterable[Tensor], shares: Sequence[float], softmax: bool) -> None:
    r"""Set biases so that logits of zero elsewhere predict the given shares.

    With sigmoid outputs, a bias is :math:`\log(p / (1 - p))`, with softmax :math:`\log p`.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, section 4.1.

    Args:
        biases: The biases, each of as many elements as there are shares.
        shares: Share of each class.
        softmax: Whether exactly one class is true.
    """
    values = torch.tensor(shares, dtype=torch.float64)
    values = values.log() if softmax else values.logit()
    with torch.no_grad():
        for bias in biases:
            bias.copy_(values.view_as(bias))


def find_output_biases(
    network: nn.Module,
    logits_of_all_outputs: Callable[[Tensor], Sequence[Tensor]],
    shape: Sequence[int],
    num_classes: int,
) -> dict[str, Tensor]:
    """Find the biases of a network's outputs.

    A bias is an output's if raising it raises the logits of each class everywhere by as much. Each one of the right
    length is tried, in a network that is switched to evaluation; the network is as before afterwards. Outputs that the
    network has in training alone are not found.

    Args:
        network: Owns the biases.
        logits_of_all_outputs: Runs the network on images of shape ``(N, C, ...)``; returns the logits of each of its
            outputs, of shape ``(N, num_classes, ...)``.
        shape: Shape of such images.
        num_classes: Number of logits.

    Returns:
        The biases by their names, in the order of the network.

    Raises:
        ValueError: If an output has no such bias.
    """
    parameters = list(network.parameters())
    if any(is_lazy(parameter) or parameter.is_meta for parameter in parameters):
        raise ZNormValueError(
            f"prior sets the bias of the last layer, and layers of {type(network).__name__} have no weights yet: call "
            "the network once on images before you pass it to the task."
        )
    named = {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.rpartition(".")[2] == "bias" and parameter.numel() == num_classes
    }
    modes = [(module, module.training) for module in network.modules()]
    found: list[str] = []
    try:
        network.eval()
        with torch.no_grad(), isolate_rng(), torch.compiler.set_stance("force_eager"):
            first = next(filter(torch.is_floating_point, parameters), torch.empty(0))
            images = torch.randn(*shape).to(first)
            before = [logits.clone() for logits in logits_of_all_outputs(images)]
            missing = set(range(len(before)))
            for name, bias in reversed(named.items()):
                raised = missing & _raised_outputs(bias, before, lambda: logits_of_all_outputs(images))
                if raised:
                    found.append(name)
                    missing -= raised
                if not missing:
                    break
    finally:
        for module, mode in modes:
            module.training = mode
    if missing:
        raise ZNormValueError(
            f"prior sets the bias of the last layer, and {type(network).__name__} has no parameter called `bias` of "
            f"{num_classes} element{'s' if num_classes > 1 else ''} that raises the logits everywhere by as much"
            + (f" (for {len(missing)} of its {len(before)} outputs)" if len(before) > 1 else "")
            + ": give its last layer a bias, or leave prior out and set the bias where you build the network."
        )
    return {name: named[name] for name in reversed(found)}


def _raised_outputs(bias: Tensor, before: Sequence[Tensor], run: Callable[[], Sequence[Tensor]]) -> set[int]:
    """Return the numbers of the outputs whose logits rise by as much as a bias, which is restored."""
    old = bias.detach().clone()
    rise = torch.arange(1, old.numel() + 1, dtype=old.dtype, device=old.device)
    bias.add_(rise.view_as(bias))
    try:
        after = run()
    finally:
        bias.copy_(old)
    raised = set()
    for number, (low, high) in enumerate(zip(before, after, strict=True)):
        expected = rise.view(1, -1, *[1] * (low.ndim - 2)).to(low)
        # No more than is rounded: in evaluation, a bias before a new batch normalization raises logits by 0.999995.
        tolerance = 8 * torch.finfo(low.dtype).eps * (low.abs().max() + expected.max())
        if bool(((high - low - expected).abs() <= tolerance).all()):
            raised.add(number)
    return raised


def shape_of_images(loader: Any, module: LightningModule, datamodule: LightningDataModule | None) -> torch.Size:
    """Return the shape of the first two training images, without a draw from the global random numbers or a worker.

    Args:
        loader: The training's loader.
        module: The module to be trained.
        datamodule: The data module of the training, if it has one. Either may change batches on their way to the
            network.

    Raises:
        ValueError: If the loader is not one of torch's, if it is empty, or if its batches do not begin with images.
    """
    advice = "set example_input_array of the task to such images"
    if not isinstance(loader, DataLoader):
        raise ZNormValueError(
            f"prior runs the network once on images of the size of the training's, and the training's loader, "
            f"{_kind_of_loader(loader)}, does not tell it: {advice}."
        )
    with isolate_rng():
        batch = next(iter(_short_loader(loader)), None)
        if batch is None:
            raise ZNormValueError(
                f"prior runs the network once on images of the size of the training's, and the training set, "
                f"{type(loader.dataset).__name__}, is empty."
            )
        for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
            of_data = datamodule is not None and is_overridden(hook, datamodule)
            batch = getattr(datamodule if of_data else module, hook)(batch, 0)
    return images_of(batch).shape


def _kind_of_loader(loader: Any) -> str:
    kind = type(loader).__name__
    return f"a {kind}" if isinstance(loader, (list, tuple, dict)) else kind


def _short_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of small batches in the order of the dataset, which draws no random number of the other's."""
    dataset: Any = loader.dataset
    if loader.batch_sampler is not None:
        return DataLoader(dataset, batch_size=2, collate_fn=loader.collate_fn)
    # The dataset makes the batches: from several indices, from one, or from none.
    several = [list(range(min(2, len(dataset))))] if isinstance(loader.sampler, BatchSampler) else None
    return DataLoader(dataset, batch_size=None, sampler=several, collate_fn=loader.collate_fn)
