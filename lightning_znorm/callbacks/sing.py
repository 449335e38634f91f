"""SING's gradients as a Lightning callback."""

from collections.abc import Sequence

from lightning_znorm.callbacks.gradient_transform import GradientTransform
from lightning_znorm.gradients import SING


class SINGCallback(GradientTransform):
    """Centres each output channel's gradient and divides each tensor's by its norm, before every optimizer step.

    This is the gradient's part of SING alone: :class:`~lightning_znorm.gradients.SING` says what else its authors'
    optimizer does, which learning rate they advise, and how it differs from ZNorm.

    Source: Courtois et al., "SING: A Plug-and-Play DNN Learning Technique", arXiv 2305.15997.

    Args:
        eps: Added to the norm, an absolute number.
        include: Shell-style pattern or patterns; a parameter takes part if its name in the LightningModule matches one.
        exclude: Pattern or patterns whose matches are left alone.
        min_ndim: Least number of dimensions of a parameter; 2 leaves biases and normalization scales alone.
        allow_untested_strategy: See :class:`GradientTransform`.
        error_if_nonfinite: See :class:`GradientTransform`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``eps`` is negative, infinite or NaN, and as :class:`GradientTransform` does.
        MisconfigurationException: As :class:`GradientTransform` does.
        UnsupportedGradientError: Before a step, if a gradient is sparse, of 8 bits, or sharded in an unknown way.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_znorm import SINGCallback
        >>> trainer = Trainer(accelerator="cpu", logger=False, callbacks=[SINGCallback()])
    """

    def __init__(
        self,
        eps: float = 1e-8,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        min_ndim: int = 0,
        allow_untested_strategy: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        super().__init__(SING(eps), include, exclude, min_ndim, allow_untested_strategy, error_if_nonfinite)
