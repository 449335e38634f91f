"""What can be wrong with a gradient."""


class UnsupportedGradientError(RuntimeError):
    """A gradient that cannot be normalized where and as it is."""
