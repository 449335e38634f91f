"""What can be wrong with a gradient."""


class UnsupportedGradientError(RuntimeError):
    """A gradient that cannot be normalized where and as it is."""


class NonFiniteGradientError(RuntimeError):
    """A gradient that holds an inf or NaN, where that was to be an error."""
