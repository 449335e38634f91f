"""Which errors are the user's to read as a sentence, and which are bugs that need their traceback."""

import linecache
import sys
import traceback

# Through whose code an error may have passed on its way: anybody else's may be at fault, and is to be shown.
_OWN = {"lightning_znorm", "lightning"}
_PASSED = _OWN | {"contextlib", "jsonargparse", "torch"}
_SYSTEM = _PASSED | {"fsspec", "lightning_fabric", "torchvision"} | sys.stdlib_module_names


def sentence(error: BaseException) -> str | None:
    """What to tell the user in place of a traceback; None where the traceback is to be shown.

    A sentence is what this package or Lightning says in a ``raise`` statement, when no code of the user's own is on the
    way there; also when jsonargparse wrapped it into an error of its own. So is what the system says of a file.

    Example:
        >>> sentence(ZeroDivisionError("a bug"))
    """
    cause: BaseException | None = error
    while cause is not None:
        if _raised_on_purpose(cause):
            return str(cause)
        if isinstance(cause, OSError) and cause.filename and cause.strerror and _packages(cause) <= _SYSTEM:
            return f"{cause.filename}: {cause.strerror}"
        cause = cause.__cause__
    return None


def _packages(error: BaseException) -> set[str]:
    """Through whose code it has passed."""
    return {frame.f_globals["__name__"].partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}


def _raised_on_purpose(error: BaseException) -> bool:
    steps = list(traceback.walk_tb(error.__traceback__))
    if not steps or not _packages(error) <= _PASSED:
        return False
    frame, line = steps[-1]
    package = frame.f_globals["__name__"].partition(".")[0]
    return package in _OWN and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
