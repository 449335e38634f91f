"""What batches hold: images, targets and the cases that they belong to; and logits in the outputs of networks.

Four forms of a batch are read, and every step of the tasks takes each of them:

- images alone, a tensor of shape ``(N, C, ...)``;
- a tuple or list that begins with images and targets, and may go on with anything, such as an index;
- the same with a dictionary about the cases anywhere after the images, as this package's data modules make them;
- a dictionary with ``image`` and ``label`` (or ``mask``), as MONAI's transforms make them, and with the same keys about
  the cases.

About the cases, a dictionary may say, each with one entry for each image: ``name`` (of the image's file), ``patient``,
``slice``, ``affine`` (shape ``(N, 4, 4)``) and ``spacing`` (shape ``(N, axes)``). The last two are best NumPy arrays:
Lightning converts tensors of a batch to the Trainer's precision.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_znorm.errors import ZNormTypeError, ZNormValueError

Matrix: TypeAlias = tuple[tuple[float, ...], ...]

_TARGETS = ("label", "mask")


@dataclass(frozen=True)
class Cases:
    """What a batch says about its images. Each list has one entry for each image, and None where nothing is said.

    Args:
        name: Name or path of the image.
        patient: Who was scanned.
        slice: Which slice of the patient's volume the image is.
        affine: Matrix from voxel numbers to millimetres, 4 x 4.
        spacing: Distance of neighbouring pixels along each axis, in the order of the image's axes.
        names_patients: Whether the batch speaks of patients, be it with None for these images.
    """

    name: list[str | None]
    patient: list[str | None]
    slice: list[str | None]
    affine: list[Matrix | None]
    spacing: list[tuple[float, ...] | None]
    names_patients: bool = False


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch.

    Args:
        batch: A batch in one of the forms above.

    Raises:
        TypeError: If the batch is something else.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = batch.get("image")
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        raise ZNormTypeError(
            f"A batch is {kind_of(batch)}, and images, a tensor, or a tuple or list that begins with them, or a "
            "dictionary with 'image', are expected: let the dataset or its collate_fn return that."
        )
    return plain(images)


def images_and_targets(batch: Any, targets: str) -> tuple[Tensor, Tensor]:
    """Return the images and targets of a batch.

    Args:
        batch: A batch in one of the forms above.
        targets: What a message calls the targets.

    Raises:
        TypeError: If the batch does not hold both.
    """
    images, found = _first(batch), _targets(batch)
    if images is None or found is None:
        raise ZNormTypeError(
            f"A batch is {kind_of(batch)}, and a tuple or list that begins with images and {targets}, both tensors, "
            "or a dictionary with 'image' and 'label', is expected: let the dataset or its collate_fn return that."
        )
    return plain(images), plain(found)


def has_targets(batch: Any) -> bool:
    """Return whether a batch holds targets beside images, such as true masks."""
    return _targets(batch) is not None


def cases_of(batch: Any) -> Cases:
    """Return what a batch says about its images.

    Entries are ignored unless there is one for each image. So are a spacing and an affine matrix in half precision, in
    which their digits are lost, with a warning.

    Args:
        batch: A batch in one of the forms above.

    Raises:
        TypeError: If the batch holds no images.
        ValueError: If a list of tensors can be read in two ways: as one for each image, and as one for each axis.

    Example:
        >>> cases = cases_of((torch.zeros(2, 3, 8, 8), {"patient": ["anna", "ben"], "slice": torch.tensor([4, 7])}))
        >>> cases.patient, cases.slice, cases.name
        (['anna', 'ben'], ['4', '7'], [None, None])
    """
    images = images_of(batch)
    count = len(images)
    said: Mapping[Any, Any] = {}
    if isinstance(batch, Mapping):
        said = batch
    elif isinstance(batch, (tuple, list)):
        said = next((part for part in batch[1:] if isinstance(part, Mapping)), {})
    original = batch.get("image") if isinstance(batch, Mapping) else _first(batch)
    names, affines = said.get("name"), said.get("affine")
    meta = getattr(original, "meta", None)  # of MONAI's MetaTensor
    if isinstance(meta, Mapping):
        names = meta.get("filename_or_obj") if names is None else names
        affines = getattr(original, "affine", None) if affines is None else affines
    affine = [_matrix(each) for each in _entries(_precise("affine", affines, count), count)]
    axes = images.ndim - 2
    spacings = _precise("spacing", said.get("spacing"), count)
    spacing = [_numbers(each, axes) for each in _entries(spacings, count)]
    return Cases(
        name=[_word(each) for each in _entries(names, count)],
        patient=[_word(each) for each in _entries(said.get("patient"), count)],
        slice=[_word(each) for each in _entries(said.get("slice"), count)],
        affine=affine,
        spacing=[
            _steps(matrix, axes) if steps is None else steps for steps, matrix in zip(spacing, affine, strict=True)
        ],
        names_patients=said.get("patient") is not None,
    )


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor of torch's own class: MONAI's carry metadata along, which makes every operation slower."""
    as_tensor = getattr(tensor, "as_tensor", None)
    found: Tensor = as_tensor() if callable(as_tensor) else tensor
    return found


def logits_of(output: Any) -> Any:
    """Return the logits in the output of a network. Outputs of torchvision and transformers hold more than logits.

    Args:
        output: The output of the network.

    Returns:
        The output's attribute or key ``logits``, or its key ``out``; any other output as it is.
    """
    if isinstance(logits := getattr(output, "logits", None), Tensor):
        return logits
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if key in output:
                return output[key]
    return output


def kind_of(value: Any) -> str:
    """Return what a message calls a batch or an output, such as "a tuple of Tensor and dict"."""
    kind = type(value).__name__
    article = "an" if kind[:1] in "AEIOUaeiou" else "a"
    if isinstance(value, Mapping):
        parts = [repr(key) for key in value]
    elif isinstance(value, (tuple, list)):
        parts = [type(part).__name__ for part in value]
    else:
        return f"{article} {kind}"
    return f"{article} {kind} of {' and '.join(parts)}" if parts else f"an empty {kind}"


def _first(batch: Any) -> Tensor | None:
    found = batch.get("image") if isinstance(batch, Mapping) else None
    if isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    return found if isinstance(found, Tensor) else None


def _targets(batch: Any) -> Tensor | None:
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _TARGETS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) else None


def _entries(values: Any, count: int) -> Sequence[Any]:
    """Return one entry for each image, or None for each if there are not as many."""
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    elif isinstance(values, (list, tuple)):
        values = [each.item() if isinstance(each, Tensor) and each.ndim == 0 else each for each in values]
    if isinstance(values, (str, os.PathLike)) and count == 1:
        return [values]
    return values if isinstance(values, (list, tuple)) and len(values) == count else [None] * count


def _precise(key: str, values: Any, count: int) -> Any:
    """Return spacings or affine matrices with one entry for each image, whichever way they were collated."""
    if isinstance(values, (list, tuple)) and (tensor := _stacked(values)) is not None and tensor.ndim > 1:
        # torch's default_collate makes such lists of the tuples of single images: axis by axis.
        if tensor.shape[0] == tensor.shape[-1] == count:
            raise ZNormValueError(
                f"A batch of {count} images holds {key!r} as a list of {count} tensors of {count} numbers each, which "
                "may be one for each image or one for each axis: give each image's as a NumPy array, or collate them "
                "into an array with one row for each image."
            )
        values = tensor.movedim(-1, 0) if tensor.shape[-1] == count else tensor
    if isinstance(values, Tensor) and values.dtype in (torch.float16, torch.bfloat16):
        warnings.warn(
            f"A batch holds {key!r} in {values.dtype}, to which Lightning has converted it, and its digits are lost: "
            "it is ignored. Let the dataset or its collate_fn return it as a NumPy array.",
            stacklevel=2,
        )
        return None
    return values


def _stacked(values: Any) -> Tensor | None:
    """Return nested lists of tensors of one dimension as one tensor, or None if they are anything else."""
    if isinstance(values, Tensor):
        return values if values.ndim == 1 else None
    parts = [_stacked(each) for each in values] if isinstance(values, (list, tuple)) and values else [None]
    tensors = [part for part in parts if part is not None]
    if len(tensors) < len(parts) or len({part.shape for part in tensors}) > 1:
        return None
    return torch.stack(tensors)


def _word(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():  # Lightning may have converted a number
        value = int(value)
    if isinstance(value, int):
        return str(value)
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else None


def _matrix(value: Any) -> Matrix | None:
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(rows, (list, tuple)) or len(rows) != 4:
        return None
    found = [_numbers(row, 4) for row in rows]
    return tuple(row for row in found if row is not None) if None not in found else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    return tuple(map(float, values)) if all(isinstance(each, (int, float)) for each in values) else None


def _steps(affine: Matrix | None, axes: int) -> tuple[float, ...] | None:
    """Return the length of the step along each axis: of a column of the affine matrix."""
    if affine is None or axes > 3:
        return None
    columns = torch.tensor(affine, dtype=torch.float64)[:3, :axes]
    return tuple(columns.square().sum(dim=0).sqrt().tolist())
