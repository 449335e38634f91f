"""The errors that this package raises on purpose.

Each derives from `ZNormError` and from the built-in exception that the documentation names, so ``except ValueError``
catches a `ZNormValueError`. The command line prints a `ZNormError` as one sentence, and so Lightning's
`MisconfigurationException`, which callbacks raise. Any other exception of this package is a bug and keeps its
traceback. This module imports nothing, because every other module may import it.
"""

__all__ = [
    "ZNormAttributeError",
    "ZNormError",
    "ZNormFileExistsError",
    "ZNormFileNotFoundError",
    "ZNormImportError",
    "ZNormOSError",
    "ZNormPermissionError",
    "ZNormRuntimeError",
    "ZNormTypeError",
    "ZNormValueError",
]


class ZNormError(Exception):
    """Base of all errors that this package raises on purpose. The message says what is wrong and what to do."""


class ZNormValueError(ZNormError, ValueError):
    """A value, a setting or the content of a file is wrong."""


class ZNormTypeError(ZNormError, TypeError):
    """An object of a wrong type was given."""


class ZNormAttributeError(ZNormError, AttributeError):
    """An object lacks a part that is asked for."""


class ZNormRuntimeError(ZNormError, RuntimeError):
    """Something cannot be done in the present state."""


class ZNormImportError(ZNormError, ImportError):
    """An optional package is missing."""


class ZNormOSError(ZNormError, OSError):
    """The system cannot read or write a file."""


class ZNormFileNotFoundError(ZNormError, FileNotFoundError):
    """A file or a folder is missing."""


class ZNormFileExistsError(ZNormError, FileExistsError):
    """A file that must not be overwritten exists."""


class ZNormPermissionError(ZNormError, PermissionError):
    """The system forbids access to a file."""
