"""Which errors are the user's to read as a sentence, and which are bugs that need their traceback."""

import linecache
import traceback

# Through whose code an error may have passed on its way: anybody else's may be at fault, and is to be shown.
_OWN = {"lightning_znorm", "lightning"}
_PASSED = _OWN | {"contextlib", "jsonargparse", "torch"}


def sentence(error: BaseException) -> str | None:
    """What to tell the user in place of a traceback; None where the traceback is to be shown.

    A sentence is what this package or Lightning says in a ``raise`` statement, when no code of the user's own is on the
    way there; also when jsonargparse wrapped it into an error of its own.

    Example:
        >>> sentence(ZeroDivisionError("a bug"))
    """
    cause: BaseException | None = error
    while cause is not None:
        if _raised_on_purpose(cause):
            return str(cause)
        cause = cause.__cause__
    return None


def _raised_on_purpose(error: BaseException) -> bool:
    steps = [
        (frame.f_globals["__name__"].partition(".")[0], frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    if not steps or not {package for package, _, _ in steps} <= _PASSED:
        return False
    package, frame, line = steps[-1]
    return package in _OWN and linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
