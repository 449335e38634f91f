"""What can be wrong with a gradient."""

from collections.abc import Sequence

import torch

from lightning_znorm.errors import ZNormRuntimeError


class UnsupportedGradientError(ZNormRuntimeError):
    """A gradient that cannot be normalized where and as it is."""


class NonFiniteGradientError(ZNormRuntimeError):
    """A gradient that holds an inf or NaN, where that was to be an error."""


def untested_torch(what: str) -> UnsupportedGradientError:
    """An error for a PyTorch that lacks what tells where gradients are."""
    return UnsupportedGradientError(
        f"PyTorch {torch.__version__} keeps gradients otherwise than the releases that were tested: {what}. Use an "
        "older release of it, or a newer one of lightning-znorm"
    )


def missing(owner: object, names: Sequence[str]) -> str:
    """Says which of the attributes that are needed of an object it lacks; nothing if it has them all."""
    lacking = [name for name in names if not hasattr(owner, name)]
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__name__} has no {', '.join(lacking)}" if lacking else ""
