"""The errors that gradients raise, and what their messages share."""

from collections.abc import Sequence

import torch

from lightning_znorm.errors import ZNormRuntimeError


class UnsupportedGradientError(ZNormRuntimeError):
    """A gradient that cannot be normalized as it is, or where it is kept."""


class NonFiniteGradientError(ZNormRuntimeError):
    """A gradient that holds an inf or NaN, where the user asked for an error."""


def untested_torch(what: str) -> UnsupportedGradientError:
    """Return an error for a PyTorch that does not tell where gradients are kept."""
    return UnsupportedGradientError(
        f"PyTorch {torch.__version__} does not keep gradients as the tested releases do: {what}. Use an "
        "older release of it, or a newer one of lightning-znorm"
    )


def missing_attributes(owner: object, names: Sequence[str]) -> str:
    """Return a text that names the attributes that an object lacks; an empty one if it has them all."""
    missing = [name for name in names if not hasattr(owner, name)]
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__name__} has no {', '.join(missing)}" if missing else ""
