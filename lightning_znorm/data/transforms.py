"""Random transforms of training images and their masks: MONAI's and torchvision's, from YAML or as objects."""

import importlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_znorm.arguments import shown
from lightning_znorm.batches import kind_of, plain
from lightning_znorm.data.datasets import IGNORED
from lightning_znorm.errors import ZNormError, ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_value
from lightning_znorm.requirements import is_ours, require

Described: TypeAlias = dict | list | Callable[..., Any] | None  # type: ignore[type-arg]
"""A transform as a data module takes it. The dictionary comes first, and has no types of its own, because jsonargparse
then keeps a description as it is and writes it into ``config.yaml``; it would write the repr of an object."""

_CLASS_PATH, _INIT_ARGS = "class_path", "init_args"


def checked_transform(name: str, value: Described) -> Described:
    """Return a transform after a check of its form, with a description as plain values.

    Nothing is imported or built, so that loading a stranger's checkpoint runs none of the code that it names.

    Args:
        name: The argument's name, for messages.
        value: A callable, a dictionary of ``class_path`` and ``init_args``, or a list of these.

    Raises:
        TypeError: If it is something else.

    Example:
        >>> checked_transform("train_transform", {"class_path": "monai.transforms.RandFlipd"})
        {'class_path': 'monai.transforms.RandFlipd'}
    """
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    steps = value if isinstance(value, (list, tuple)) else [value]
    for step in steps:
        is_description = isinstance(step, Mapping) and _CLASS_PATH in step and {*step} <= {_CLASS_PATH, _INIT_ARGS}
        if not is_description and (not callable(step) or isinstance(step, type)):
            raise ZNormTypeError(
                f"{name} must be a transform, {{class_path: ..., init_args: {{...}}}} or a list of these, got "
                f"{shown(step)}."
            )
    if any(callable(step) for step in steps):
        return [step if callable(step) else plain_value(name, step) for step in steps]
    described: Described = plain_value(name, value)
    return described


def hyperparameter(transform: Described) -> Described:
    """Return what a checkpoint can hold of a checked transform: its description, or None in place of objects."""
    steps = transform if isinstance(transform, list) else [transform]
    return None if any(map(callable, steps)) else transform


def built(name: str, value: Described) -> list[Callable[..., Any]]:
    """Build transforms from what `checked_transform` returned.

    Args:
        name: The argument's name, for messages.
        value: A transform, a description, or several.

    Raises:
        ValueError: If a class cannot be imported or built, or transforms images without their masks.

    Example:
        >>> flips = {"class_path": "torchvision.transforms.v2.RandomHorizontalFlip", "init_args": {"p": 0.25}}
        >>> built("train_transform", [flips])
        [RandomHorizontalFlip(p=0.25)]
    """
    if value is None:
        return []
    steps = [_instance(name, each) for each in (value if isinstance(value, list) else [value])]
    for step in (part for each in steps for part in _parts(each)):
        if remedy := _remedy(step):
            raise ZNormValueError(
                f"{name}: {_name(step)} transforms an image alone, and its mask must follow: {remedy}."
            )
    return steps


class CaseTransforms:
    """Apply transforms to the images and masks of a batch, to each with its own draws.

    A transform is called with

    - ``tv_tensors.Image`` and ``tv_tensors.Mask``, if it is one of `torchvision.transforms.v2`;
    - otherwise with a dictionary of ``image`` and ``label``, as MONAI's dictionary transforms are, and returns one.

    Images are float32, from 0 to 1 (the largest value that a pixel may have), masks hold whole numbers of
    classes. A step may give the next one an image of another type, such as uint8, and the last one returns floats.

    The draws of a case follow from its seed. Independent seeds that are drawn from it set Python's, NumPy's and torch's
    generators and, for each step, MONAI's random state. All of these are as before afterwards, except MONAI's.

    Args:
        name: The argument's name, for messages.
        steps: The transforms.
        num_classes: Masks hold numbers below this, and `IGNORED`.
        max_value: The largest value that a pixel may have.

    Raises:
        ValueError: When called, if a transform fails, or returns an image and a mask that do not fit together.

    Example:
        >>> from torchvision.transforms import v2
        >>> flip = CaseTransforms("train_transform", [v2.RandomHorizontalFlip(p=1.0)], num_classes=2, max_value=255)
        >>> images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
        >>> flip(images, torch.tensor([[[[0, 1]]]], dtype=torch.uint8), seeds=[3])
        (tensor([[[[1., 0.]]]]), tensor([[[[1, 0]]]], dtype=torch.uint8))
    """

    def __init__(self, name: str, steps: Sequence[Callable[..., Any]], num_classes: int, max_value: int) -> None:
        self.name = name
        self.steps = list(steps)
        self.num_classes = num_classes
        self.max_value = max_value

    def __call__(self, images: Tensor, masks: Tensor, seeds: Sequence[int | None]) -> tuple[Tensor, Tensor]:
        """Return new images, float32 in ``(N, C, H, W)``, and masks, uint8 in ``(N, 1, H, W)``.

        Args:
            images: Of an integer type, shape ``(N, C, H, W)``.
            masks: Shape ``(N, 1, H, W)``.
            seeds: One for each image. With None, it goes on with the generators as they are.
        """
        changed = [self._changed(*case) for case in zip(images, masks, seeds, strict=True)]
        sizes = {tuple(image.shape[1:]) for image, _ in changed}
        if len(sizes) > 1:
            raise ZNormValueError(
                f"{self.name}: {' and '.join(map(_name, self.steps))} made images of {len(sizes)} sizes for one batch "
                f"({', '.join(map(str, sorted(sizes)))}): end with a crop or resize to one size."
            )
        return torch.stack([image for image, _ in changed]), torch.stack([mask for _, mask in changed])

    def _changed(self, image: Tensor, mask: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        image = image.float() / self.max_value
        # One seed for each generator. MONAI's states are NumPy's generators: from one seed, both would draw the same.
        of_generators, of_steps = _seeds(seed, len(self.steps))
        with _drawn_from(of_generators):
            for step, step_seed in zip(self.steps, of_steps, strict=True):
                if step_seed is not None and hasattr(step, "set_random_state"):  # of MONAI
                    step.set_random_state(seed=step_seed)
                try:
                    found = _applied(step, image, mask)
                except Exception as error:  # of a user's function, which may raise any
                    raise ZNormValueError(
                        f"{self.name}: {_name(step)} failed on an image of shape {tuple(image.shape)} and its mask "
                        f"({type(error).__name__}: {error}): it is called with "
                        f"{'an Image and a Mask' if _is_of_torchvision(step) else 'a dict of image and label'}."
                    ) from error
                image, mask = self._checked(step, found, channels=len(image))
        if not image.is_floating_point():
            raise ZNormValueError(
                f"{self.name}: {_name(self.steps[-1])} returned an image of {image.dtype}, and floats from 0 to 1 are "
                "expected in the end: end with torchvision.transforms.v2.ToDtype(torch.float32, scale=True), or divide "
                "by the largest value."
            )
        return image.float(), mask

    def _checked(self, step: Any, found: Any, channels: int) -> tuple[Tensor, Tensor]:
        who = f"{self.name}: {_name(step)}"
        if not isinstance(found, tuple):
            raise ZNormValueError(f"{who} returned {kind_of(found)}, and a dict with 'image' and 'label' is expected.")
        image, mask = (plain(torch.as_tensor(part)) for part in found)
        if image.ndim not in (3, 4) or len(image) != channels or mask.shape != (1, *image.shape[1:]):
            raise ZNormValueError(
                f"{who} returned an image of shape {tuple(image.shape)} and a mask of shape {tuple(mask.shape)}, and "
                f"{channels} channels and one mask of the same size are expected: let it transform both alike."
            )
        classes = mask.to(torch.uint8)
        is_class = (classes == mask) & ((classes < self.num_classes) | (classes == IGNORED))
        if not is_class.all():
            values = torch.unique(mask[~is_class])  # sorts: too slow for all masks
            raise ZNormValueError(
                f"{who} returned a mask with the values {', '.join(f'{value:g}' for value in values[:3])}, "
                f"and whole numbers below {self.num_classes} are expected: let it interpolate the label by 'nearest'."
            )
        return image, classes


def _applied(step: Callable[..., Any], image: Tensor, mask: Tensor) -> Any:
    """Return the image and the mask as a tuple, or what a step returned that holds no such."""
    if _is_of_torchvision(step):
        from torchvision import tv_tensors

        names: Any = tv_tensors  # for mypy, which takes a module without __all__ to export nothing
        image, mask = step(names.Image(image), names.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)
    found = step({"image": image, "label": mask.float()})
    if isinstance(found, list) and len(found) == 1:  # of MONAI's crops, which may return several samples
        found = found[0]
    return (found["image"], found["label"]) if isinstance(found, Mapping) else found


def _seeds(seed: int | None, steps: int) -> tuple[list[int] | None, list[int | None]]:
    """Return independent seeds of 32 bits, for Python's, NumPy's and torch's generators and for each step."""
    if seed is None:
        return None, [None] * steps
    words: list[int] = np.random.SeedSequence(seed).generate_state(3 + steps, np.uint32).tolist()
    return words[:3], [*words[3:]]


@contextmanager
def _drawn_from(seeds: list[int] | None) -> Iterator[None]:
    """Let the draws of Python's, NumPy's and torch's generators follow from a seed each, and put them back."""
    if seeds is None:
        yield
        return
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed the GPUs' generators too
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _instance(name: str, described: Any) -> Any:
    """Build what a dictionary with ``class_path`` describes, and what its arguments hold. Others stay as they are."""
    if isinstance(described, list):
        return [_instance(name, each) for each in described]
    if not isinstance(described, Mapping):
        return described
    if _CLASS_PATH not in described:
        return {key: _instance(name, each) for key, each in described.items()}
    path, arguments = described[_CLASS_PATH], described.get(_INIT_ARGS) or {}
    found = _imported(name, path)
    # Only what is called with images: a checkpoint of a stranger may name anything.
    is_class = isinstance(found, type) and any("__call__" in vars(base) for base in found.__mro__[:-1])
    if not is_class:
        if callable(found) and not isinstance(found, type) and not arguments:
            return found
        raise ZNormValueError(f"{name}: {path} is no class of transforms: name one that is called with a case.")
    try:
        return found(**{key: _instance(name, each) for key, each in arguments.items()})
    except ZNormError:
        raise
    except Exception as error:  # of any package
        raise ZNormValueError(
            f"{name}: {path} cannot be made with {shown(dict(arguments))} ({type(error).__name__}: {error}): see its "
            "documentation for its arguments."
        ) from error


def _imported(name: str, path: Any) -> Any:
    module, _, attribute = str(path).rpartition(".")
    if is_ours(package := module.partition(".")[0]):
        require(f"{name}: {path}", package)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ZNormValueError(
            f"{name}: {path} cannot be imported ({error}): write the module and the class, such as "
            "monai.transforms.RandFlipd."
        ) from error


def _is_of_torchvision(step: Any) -> bool:
    # If it is not loaded, the step is none of its transforms.
    v2: Any = sys.modules.get("torchvision.transforms.v2")
    return v2 is not None and isinstance(step, v2.Transform)


def _parts(step: Any) -> Iterator[Any]:
    """Yield a transform and those that it is composed of."""
    yield step
    composed = getattr(step, "transforms", None)
    for each in composed if isinstance(composed, (list, tuple)) else ():
        yield from _parts(each)


def _remedy(step: Any) -> str:
    """Return what to use in place of a transform of images alone."""
    modules = [base.__module__ for base in type(step).__mro__]
    if any(module.startswith("torchvision.transforms.") for module in modules) and not _is_of_torchvision(step):
        return f"use torchvision.transforms.v2.{type(step).__name__}"
    if any(module.startswith("monai.transforms.") for module in modules):
        from monai.transforms import Compose, MapTransform

        if not isinstance(step, (Compose, MapTransform)):
            return f"use {type(step).__name__}d with keys: [image, label]"
    return ""


def _name(step: Any) -> str:
    return str(getattr(step, "__name__", type(step).__name__))
