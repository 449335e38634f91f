"""Images and targets from batches, and logits from the outputs of networks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_znorm.errors import ZNormTypeError


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch.

    Args:
        batch: Images, or a tuple or list that begins with images.

    Raises:
        TypeError: If the batch is something else.
    """
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise ZNormTypeError(
            f"A batch is {kind_of(batch)}, and images, a tensor, or a tuple or list that begins with them, are "
            "expected: let the dataset or its collate_fn return that."
        )
    return images


def images_and_targets(batch: Any, targets: str) -> tuple[Tensor, Tensor]:
    """Return the images and targets of a batch.

    Args:
        batch: A tuple or list that begins with images and targets. Further entries, such as an index, are ignored.
        targets: What a message calls the targets.

    Raises:
        TypeError: If the batch does not begin with both.
    """
    if not isinstance(batch, (tuple, list)) or not all(isinstance(part, Tensor) for part in (*batch, None)[:2]):
        raise ZNormTypeError(
            f"A batch is {kind_of(batch)}, and a tuple or list that begins with images and {targets}, both tensors, "
            "is expected: let the dataset or its collate_fn return that."
        )
    return batch[0], batch[1]


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
